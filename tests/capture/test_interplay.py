"""Failures, stops, copied contexts, hooks and checkpointing together: of the kind that test_any_capture.py makes up."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import pickle
import threading
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.capture.nets import Net, same, x
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import weightlift as wl

Pair = namedtuple("Pair", "a b")


class Gives(nn.Module):
    """Gives what a function makes of two tensors."""

    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, value: torch.Tensor) -> Any:
        return self.make(value + 1, value * 2)


class Writes(nn.Module):
    """Writes to what its child gave."""

    def __init__(self, make: Callable[[Any, Any], Any], write: Callable[[Any], object]) -> None:
        super().__init__()
        self.child = Gives(make)
        self.write = write

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.write(self.child(value))
        return value


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (lambda a, b: (a, b), lambda given: given[1].mul_(2)),
        (lambda a, b: {"a": (a, [b])}, lambda given: given["a"][1][0].mul_(2)),
        (lambda a, b: [a, b], lambda given: given.append(given[0])),
        (lambda a, b: {"a": a}, lambda given: given.update(a=given["a"] * 2)),
    ],
)
def test_a_container_that_was_written_to(make: Any, write: Any) -> None:
    net = Writes(make, write)
    with pytest.raises(wl.CaptureError, match="written to"), wl.capture(net, child="child"):
        net(torch.ones(2))
    with wl.capture(net, child=wl.Output("child", clone=True)) as got:
        net(torch.ones(2))
    assert same(tensors(got["child"][0]), tensors(make(torch.ones(2) + 1, torch.ones(2) * 2)))


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in tensors(part)]


def test_containers_that_nobody_wrote_to() -> None:
    ring: list[Any] = [torch.ones(2)]
    ring.append(ring)
    net = nn.Sequential(Gives(lambda a, b: (a, {"b": b}, ring)))
    with wl.capture(net, given="0") as got:
        net(torch.ones(2))
    assert got["given"][0][2] is ring
    with wl.capture(net, given=wl.Output("0", index=1)) as got:
        net(torch.ones(2))
    assert torch.equal(pickle.loads(pickle.dumps(got))["given"][0]["b"], torch.ones(2) * 2)


def test_a_users_hook_is_seen_though_another_capture_was_open_before_it_was_put_on() -> None:
    net, value = Net(), x()
    results = []

    def elsewhere() -> None:
        with wl.capture(net, head="head", given=wl.Input("head")) as got:
            net(value)
        results.append(got)

    with wl.capture(net, head="head", given=wl.Input("head")):
        handles = [
            net.head.register_forward_hook(lambda module, args, output: output * 0),
            net.head.register_forward_pre_hook(lambda module, args: (args[0] * 0,)),
        ]
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
        net(value)
    assert not results[0]["head"][0].any() and not results[0]["given"][0].any()
    for handle in handles:
        handle.remove()
    assert not net.head._forward_hooks and not net.head._forward_pre_hooks


class Fragile(nn.Module):
    """Fails when asked to; before, it may call itself and catch what fails there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, value: torch.Tensor, *, fails: str = "", within: bool = False) -> torch.Tensor:
        if fails == "early":
            raise ValueError("as asked for")
        if within:
            with contextlib.suppress(ValueError):
                self(value + 10, fails="late")
        value = self.layer(value)
        if fails:
            raise ValueError("as asked for")
        return value


def fail(net: nn.Module, value: torch.Tensor, when: str = "late") -> None:
    with pytest.raises(ValueError, match="as asked for"):
        net(value, fails=when)


def test_calls_are_counted_anew_after_a_failure_under_two_captures() -> None:
    net, value = Fragile(), torch.ones(1)
    with wl.capture(net, a=wl.Input("layer", calls=[0])) as one, wl.capture(net, b=wl.Input("layer", calls=[0])) as two:
        fail(net, value * 2)
        net(value)
    assert same(one["a"], [value]) and same(two["b"], [value])


def test_a_module_that_is_called_directly_after_a_failure() -> None:
    net, value = Fragile(), torch.ones(1)
    with wl.capture(net, seen="layer") as got:
        net(value)
        fail(net, value * 2)
        net.layer(value * 3)
    assert same(got["seen"], [value, value * 3])
    assert not net._forward_hooks and not net._forward_hooks_always_called


def test_an_inner_forward_that_failed_and_was_caught_leaves_nothing() -> None:
    net, value = Fragile(), torch.ones(1)
    with wl.capture(net, seen="layer") as got:
        net(value, within=True)
        net(value * 2)
    assert same(got["seen"], [value, value * 2])
    assert [len(forward) for forward in got.forwards("seen")] == [1, 1]


def test_a_context_copied_within_a_forward_takes_nothing_from_it() -> None:
    net, value = Net(), x()
    contexts: list[contextvars.Context] = []
    handle = net.head.register_forward_hook(lambda *_: contexts.append(contextvars.copy_context()))
    with wl.capture(net, hidden="layers.*") as got:
        net(value)
        contexts[0].run(net, value)
    handle.remove()
    assert [len(forward) for forward in got.forwards("hidden")] == [3, 3]


def test_a_stop_elsewhere_excuses_nothing_here() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.never = nn.Identity(), nn.Identity()

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            def work() -> None:
                with wl.capture(self.layer, first=wl.Output("", stop=True)):
                    self.layer(value)

            thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
            thread.start()
            thread.join(60)
            return value

    net = Stops()
    with pytest.raises(wl.CaptureError, match="never"), wl.capture(net, both="*"):
        net(x())


def test_a_failure_elsewhere_leaves_nothing_where_the_last_forward_was_stopped() -> None:
    net, value = Fragile(), torch.ones(1)
    with wl.capture(net, first=wl.Input(""), last=wl.Output("layer", stop=True, calls=[1])) as got:
        contextvars.copy_context().run(net, value)
        thread = threading.Thread(target=contextvars.copy_context().run, args=(fail, net, value * 2, "early"))
        thread.start()
        thread.join(60)
        net(value * 3)
    assert same(got["first"], [value, value * 3])


def test_a_stopped_forward_does_not_excuse_another_that_skips_a_module() -> None:
    class Skips(Net):
        def forward(self, value: torch.Tensor, skipped: int = -1) -> torch.Tensor:
            for place, layer in enumerate(self.layers):
                value = value if place == skipped else layer(value)
            return value

    net = Skips()

    def stop() -> None:
        with wl.capture(net, first=wl.Output("layers.0", stop=True)):
            net(x())

    with wl.capture(net, hidden="layers.*") as got:
        net(x())
        stop()
    assert [*map(len, got.forwards("hidden"))] == [3, 1]
    for before in (0, 1):
        text = r"layers\.1.*as often as the model ran"
        with pytest.raises(wl.CaptureError, match=text), wl.capture(net, hidden="layers.*"):
            for _ in range(before):
                net(x())
            stop()
            net(x(), skipped=1)


def test_a_stopped_forward_stays_when_another_begins() -> None:
    net, value = Net(), x()
    with wl.capture(net, first="layers.0") as outer:
        with wl.capture(net, second=wl.Output("layers.1", stop=True)):
            net(value)
        net(value)
    assert len(outer["first"]) == 2


def on_thread(run: Callable[[], Any]) -> Any:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    raise failed[0]


def test_a_forward_whose_hooks_fail_after_it_has_ended_leaves_nothing() -> None:
    net, value = Net(), x()
    seen = []

    def fails(module: nn.Module, args: Any, output: Any) -> None:
        if len(seen) % 2:
            raise ValueError("a hook of the user's")

    def odd(output: torch.Tensor) -> Any:
        seen.append(output)
        if len(seen) % 3 == 2:
            raise ValueError("an edit")
        return output

    outputs = []
    later = wl.capture(net, edited=wl.Output("", replace=odd))
    with wl.capture(net, layers="layers.*", own="") as got, later as within:
        for _ in range(6):
            with contextlib.suppress(ValueError):
                outputs.append(net(value))
    assert len(seen) == 6 and len(outputs) == 4
    for values in got["own"], within["edited"]:
        assert [id(item) for item in values] == [id(item) for item in outputs]
    assert [len(values) for values in got.forwards("layers")] == [len(net.layers)] * 4

    seen[:] = [value]
    handle = net.register_forward_hook(fails)
    behind_the_hook = wl.capture(net, layers=wl.Output("layers.*", expect="maybe"))
    with behind_the_hook as got, pytest.raises(ValueError, match="a hook"):
        net(value)
    handle.remove()
    assert not got["layers"]


def test_what_comes_after_a_stop_is_not_in_the_forward_that_was_stopped() -> None:
    net, value = Net(), x()
    with wl.capture(net, got=wl.Output("layers.1")) as got:
        before = net.layers[1](value)
        with wl.capture(net, first=wl.Output("layers.0", stop=True)):
            net(value)
        after = net.layers[1](value)  # called directly, as before
        net(value)
    directly, within = got.forwards("got")
    assert len(directly) == 2 and directly[0] is before and directly[1] is after and len(within) == 1


@pytest.mark.parametrize("carry", [lambda run: run(), on_thread])
def test_a_forward_in_a_copied_context_that_another_capture_stops_has_not_failed(carry: Callable[[Any], Any]) -> None:
    net, value = Net(), x()
    with wl.capture(net, first="layers.0", last=wl.Output("head", expect="some")) as outer:
        with wl.capture(net, second=wl.Output("layers.1", stop=True)):
            carry(functools.partial(contextvars.copy_context().run, net, value))
        net(value)
    assert len(outer["first"]) == 2 and len(outer["last"]) == 1


@pytest.mark.filterwarnings("ignore")
def test_edits_and_what_is_cut_off_on_a_thread_within_checkpointing() -> None:
    class Region(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = nn.Linear(4, 4), reentrant

        def forward(self, value: torch.Tensor) -> Any:
            return checkpoint(self.work, value, use_reentrant=self.reentrant)

        def work(self, value: torch.Tensor) -> Any:
            result: list[Any] = []
            grad, context = torch.is_grad_enabled(), contextvars.copy_context()

            def run() -> None:
                with torch.set_grad_enabled(grad):
                    result.append(self.inner(value))

            thread = threading.Thread(target=context.run, args=(run,))
            thread.start()
            thread.join(60)
            return result[0]

    value = torch.ones(1, 4, requires_grad=True)
    with pytest.raises(wl.CaptureError, match="cut off"), wl.capture(net := Region(True), inner="inner"):
        net(value)
    edited = wl.Output("inner", replace=torch.neg)
    with pytest.raises(wl.CaptureError, match="edited within"), wl.capture(net := Region(False), inner=edited):
        net(value)


@pytest.mark.filterwarnings("ignore")
def test_checkpointing_within_reentrant_checkpointing_is_cut_off_too() -> None:
    class Region(nn.Module):
        def __init__(self, inner: nn.Module, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = inner, reentrant

        def forward(self, value: torch.Tensor) -> Any:
            return checkpoint(self.inner, value, use_reentrant=self.reentrant)

    net = Region(Region(nn.Linear(4, 4), reentrant=False), reentrant=True)
    with pytest.raises(wl.CaptureError, match="cut off"), wl.capture(net, inner="inner.inner"):
        net(torch.ones(1, 4, requires_grad=True))


def test_a_shared_module_goes_by_the_first_of_its_names() -> None:
    net = nn.Sequential(nn.Sequential(nn.Identity(), nn.Linear(4, 4)), nn.Identity())
    net[1] = net[0][1]
    with wl.capture(net, some="**.1") as got:
        net(torch.ones(1, 4))
    assert list(got.calls("some")) == ["0.1"]
    assert list(dict(net.named_modules())) == ["", "0", "0.0", "0.1"]


def test_a_field_of_a_named_tuple_is_edited() -> None:
    net = nn.Sequential(Gives(Pair))
    with wl.capture(net, a=wl.Output("0", index="b", replace=lambda value: value * 0)):
        assert not net(torch.ones(2)).b.any()


class Nested(nn.Module):
    """Calls its layer, and then itself a few times without."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, value: torch.Tensor, within: int = 0, skips: bool = False) -> torch.Tensor:
        value = value if skips else self.layer(value)
        for _ in range(within):
            value = self(value, skips=True)
        return value


@pytest.mark.parametrize("within", [1, 2])
def test_a_forward_within_another_that_skips_a_module(within: int) -> None:
    net = Nested()
    with pytest.raises(wl.CaptureError, match="as often as the model ran"), wl.capture(net, seen="layer"):
        net(x(), within)
    with wl.capture(net, seen=wl.Output("layer", expect="some")) as got:
        net(x(), within)
    assert len(got["seen"]) == 1


@pytest.mark.parametrize(
    "tap",
    [
        wl.Output("a", tokens=[0, 2]),
        wl.Output("a", index=lambda output: output * output),
        wl.Input("b", index=lambda call: call[0][0] * call[0][0]),
    ],
)
def test_what_is_made_of_an_output_within_checkpointing_is_not_the_regions(tap: wl.Output) -> None:
    """The recomputation does not make it again: torch missed tensors there, in the user's backward."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.work, value, use_reentrant=False)

        def work(self, value: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(value).relu())

    torch.manual_seed(0)
    net, value = Checkpointed(), torch.randn(2, 3, 4)
    grads = []
    for forward in (net, net.work):
        net.zero_grad()
        with wl.capture(net, taken=tap) as got:
            output = forward(value)
        (output.sum() + got["taken"][0].pow(2).sum()).backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("within", [False, True], ids=["afterwards", "within the block"])
@pytest.mark.parametrize(
    "tap",
    [
        wl.Output("*", clone=True),
        wl.Output("a", dtype=torch.float64),
        wl.Output("a", tokens=[0, 2]),
        wl.Output("a", index=lambda output: output.clone()),
        wl.Input("b", index=lambda call: call[0][0].clone()),
    ],
)
def test_what_selective_checkpointing_keeps_is_the_models_own(tap: wl.Output, within: bool) -> None:
    """It gives the recomputation what it kept by the order of the operators: gradients were wrong and nothing said."""
    kept = torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.index.Tensor

    def policy(_: object, operator: object, *__: Any, **___: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            choose = functools.partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(self.work, value, use_reentrant=False, context_fn=choose)

        def work(self, value: torch.Tensor) -> torch.Tensor:
            # What is saved for the backward is made of what the region keeps.
            value = self.b(self.a(value).sin().clone().exp()[:, [0, 2]]).to(torch.float64)
            return (value.cos() * value).clone().exp()

    torch.manual_seed(0)
    net, value = Checkpointed(), torch.randn(2, 3, 4)
    plain = torch.autograd.grad(net(value).sum(), [*net.parameters()])
    with wl.capture(net, taken=tap) as got:
        output = net(value)
        if within:
            output.sum().backward()
    if not within:
        output.sum().backward()
    assert got["taken"]
    assert all(map(torch.equal, plain, [parameter.grad for parameter in net.parameters()]))
