"""Forwards that fail within a capture, and what comes in the moment in which one opens or closes."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import threading
from typing import Any

import pytest
import torch
from tests.capture.nets import hooks_on
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import LlamaConfig, LlamaModel

import weightlift as wl
from weightlift.capture import hooks
from weightlift.capture.session import Session


class Pair(nn.Module):
    """Two layers. ``fails_after``: how many of them run before it fails; ``only``: how many run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, fails_after: int = 9, only: int = 2) -> torch.Tensor:
        for count, layer in enumerate([self.a, self.b][:only]):
            if count == fails_after:
                break
            x = layer(x)
        if fails_after <= only:
            raise ValueError("as asked for")
        return x


def fail(net: nn.Module, **options: Any) -> None:
    with pytest.raises(ValueError, match="as asked for"):
        net(torch.ones(1, 4), **options)


@torch.no_grad()
@pytest.mark.parametrize("calls", [[0], [-1], [0, -1]])
def test_calls_are_counted_without_those_of_failed_forwards(calls: list[int]) -> None:
    net = Pair()
    with wl.capture(net, taken=wl.Output("a", calls=calls)) as got:
        fail(net, fails_after=1)
        kept = net.a(torch.full((1, 4), 2.0))
        net(torch.full((1, 4), 2.0))
    assert {entry.shape for entry in got["taken"]} == {kept.shape}
    assert torch.equal(got["taken"][0], kept)


@torch.no_grad()
def test_a_failed_forward_does_not_stand_for_a_layer_that_another_skipped() -> None:
    net = Pair()
    with pytest.raises(wl.CaptureError, match="did not fire as often"), wl.capture(net, both=["a", "b"]):
        fail(net, fails_after=2)
        net(torch.ones(1, 4), only=1)


@torch.no_grad()
@pytest.mark.parametrize("calls", [[0], [-1], [1], None])
def test_a_forward_that_fails_around_one_that_does_not(calls: list[int] | None) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, value: torch.Tensor, within: bool = True) -> torch.Tensor:
            value = self.layer(value)
            if within:
                self(value * 2, within=False)
                self.layer(value * 3)
                raise ValueError("as asked for")
            return value

    net, value = Around(), torch.ones(1)
    capture = wl.capture(net, seen=wl.Output("layer", calls=calls))
    with contextlib.ExitStack() as stack:
        if calls in ([0], [-1]):  # the call that is the first, and the last, when the others do not count
            stack.enter_context(pytest.raises(wl.CaptureError, match="was let go"))
        with capture as got:
            with contextlib.suppress(ValueError):
                net(value)
            if calls == [1]:
                net(value * 4, within=False)
    assert list(got["seen"]) == {None: [value * 2], 1: [value * 4]}.get(calls and calls[0], [])


def test_what_was_awaited_is_awaited_again_after_a_failure() -> None:
    net, x = Pair(), torch.ones(1, 4)
    net.b = net.a
    with wl.capture(net, taken=wl.Output("a", calls=[0, 1], stop=True)) as got:
        fail(net, fails_after=1)
        net(x)
    assert len(got["taken"]) == 2


@torch.no_grad()
def test_a_forward_that_another_capture_stopped_has_not_failed() -> None:
    net, x = Pair(), torch.ones(1, 4)
    with wl.capture(net, both=["a", "b"]) as outer, wl.capture(net, first=wl.Output("a", stop=True)) as inner:
        net(x)
    assert len(outer["both"]) == len(inner["first"]) == 1
    assert torch.equal(outer["both"][0], inner["first"][0])


@torch.no_grad()
def test_a_declared_value_that_cannot_be_made_fails_the_whole_forward() -> None:
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval()
    short, long = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)
    with wl.capture(model, wl.Declared("hidden_states", tokens=5), layers="layers.*") as got:
        with pytest.raises(IndexError):
            model(short)
        model(long)
    assert [value.shape[1] for value in got["layers"]] == [8, 8, 8]
    assert len(got["hidden_states"]) == 4


def test_a_recomputation_does_not_end_the_forward_around_it() -> None:
    class Around(Pair):
        def forward(self, x: torch.Tensor, inner: bool = True) -> torch.Tensor:
            if not inner:
                return self.a(x)
            x = x.detach().requires_grad_()
            with set_checkpoint_early_stop(False):
                y = checkpoint(self, x, False, use_reentrant=False)
                torch.autograd.grad(y.sum(), x)
            return self.b(self.a(x))

    net = Around()
    with wl.capture(net, both=wl.Output(["a", "b"], expect="some")) as got:
        net(torch.ones(1, 4))
        net(torch.ones(1, 4))
    assert sorted(map(len, got.forwards("both"))) == [1, 1, 2, 2]


@torch.no_grad()
def test_an_interrupt_before_the_hooks_are_on_takes_those_of_no_other_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(session: object) -> None:
        raise KeyboardInterrupt

    net, x = Pair(), torch.ones(1, 4)
    with wl.capture(net, both=["a", "b"]) as got:
        net(x)
        with monkeypatch.context() as patched:
            patched.setattr(hooks, "install", interrupted)
            with pytest.raises(KeyboardInterrupt):
                wl.capture(net, other="a").__enter__()
        gc.collect()
        net(x)
    assert len(got["both"]) == 4
    assert hooks_on(net) == 0


@torch.no_grad()
@pytest.mark.parametrize("late", [False, True], ids=["before the hooks are off", "afterwards"])
def test_an_interrupt_while_the_capture_closes_leaves_no_hook(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    remove = hooks.remove

    def interrupted(session: Session) -> None:
        if late:
            remove(session)
        raise KeyboardInterrupt

    net, x = Pair(), torch.ones(1, 4)
    with wl.capture(net, both="*") as got:  # of the same taps: what stands there once for both must be taken off once
        net(x)
        with monkeypatch.context() as patched:
            patched.setattr(hooks, "remove", interrupted)
            with pytest.raises(KeyboardInterrupt), wl.capture(net, both="*"):
                pass
        gc.collect()
        net(x)
    assert len(got["both"]) == 4
    assert hooks_on(net) == 0


@torch.no_grad()
@pytest.mark.parametrize("tap", [wl.Output("*"), wl.Output("*", clone=True), wl.Input("*")])
@pytest.mark.parametrize("within", [False, True], ids=["between forwards", "in a forward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_that_leaves_the_block_takes_nothing_of_the_forwards_before_it(
    tap: wl.Output, within: bool, error: type[BaseException]
) -> None:
    """Without options everything was lost, and with them an interrupted forward left its part."""

    def fail(*_: object) -> None:
        raise error

    net, x = Pair(), torch.ones(1, 4)
    with pytest.raises(error), wl.capture(net, both=tap) as got:
        net(x)
        if not within:
            fail()
        net.b.register_forward_pre_hook(fail)
        net(x)
    assert [*map(len, got.forwards("both"))] == [2]


@torch.no_grad()
def test_a_stop_around_a_block_takes_nothing_of_what_that_recorded() -> None:
    net, x = Pair(), torch.ones(1, 4)
    with wl.capture(net, last=wl.Output("b", stop=True)), wl.capture(net, both="*") as got:
        net(x)
    assert list(got.named("both")) == ["a"]


@torch.no_grad()
def test_a_forward_that_begins_while_the_capture_closes_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    begins, closed = threading.Event(), threading.Event()
    begin = Session.begin
    results: list[torch.Tensor] = []

    def late(self: Session, *args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is worker:
            begins.set()
            assert closed.wait(60)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(Session, "begin", late)
    net, x = Pair(), torch.ones(1, 4)
    with wl.capture(net, both=wl.Output(["a", "b"], expect="maybe")):
        context = contextvars.copy_context()
        worker = threading.Thread(target=lambda: results.append(context.run(net, x)))
        worker.start()
        assert begins.wait(60)
    closed.set()
    worker.join()
    assert len(results) == 1 and torch.equal(results[0], net(x))
