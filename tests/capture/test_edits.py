"""What a ``replace`` function may return, for captures and compiled recorders alike."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.capture.nets import Answer, Attention, Mixed, Net, same, states, x
from torch import nn

import weightlift as wl

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("nothing_compiled")]


def eager(model: nn.Module, value: torch.Tensor, taps: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    with wl.capture(model, **taps) as got:
        out = model(value)
    return out, got


def compiled(model: nn.Module, value: torch.Tensor, taps: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    return torch.compile(wl.recorder(model, **taps), backend="eager", fullgraph=True)(value)


HOW = pytest.mark.parametrize("call", [eager, compiled])
PART = pytest.mark.parametrize("part", [{}, {"tokens": 0}, {"tokens": [0, 2]}, {"at": (0,)}], ids=str)
Calls = Callable[[nn.Module, torch.Tensor, dict[str, Any]], tuple[torch.Tensor, Any]]


@HOW
@PART
def test_none_leaves_the_value_as_it_is(call: Calls, part: dict[str, Any]) -> None:
    net, value = Net(), x()
    taps = {
        "edited": wl.Output("layers.1", replace=lambda _: None, **part),
        "element": wl.Output("layers.0.attention", index=1, replace=lambda _: None, **part),
        "given": wl.Input("layers.2", replace=lambda _: None, **part),
    }
    with torch.no_grad():
        out, got = call(net, value, taps)
        _, plain = call(net, value, {"edited": wl.Output("layers.1", **part), "given": wl.Input("layers.2", **part)})
        assert same([out], [net.head(states(net, value)[-1])])
    assert same(got["edited"], plain["edited"]) and same(got["given"], plain["given"])


@HOW
@PART
def test_none_after_writing_in_place(call: Calls, part: dict[str, Any]) -> None:
    """A hook that works in place returns nothing either, whether it was given a view or a copy."""
    net, value = Net(), x()

    def zero(tensor: torch.Tensor) -> None:
        tensor.zero_()

    tap = wl.Output("layers.2", replace=zero, **part)
    returning = wl.Output("layers.2", replace=torch.zeros_like, **part)
    with torch.no_grad():
        out, got = call(net, value, {"edited": tap})
        expected, other = call(net, value, {"edited": returning})
    assert same([out], [expected]) and same(got["edited"], other["edited"])
    assert not got["edited"][0].any()


@HOW
def test_gradients_flow_through_a_value_that_is_left(call: Calls) -> None:
    net, value = Net(), x()
    out, _ = call(net, value, {"edited": wl.Output("layers.1", tokens=-1, replace=lambda _: None)})
    out.sum().backward()
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net(value).sum().backward()
    assert all(torch.allclose(one, two.grad, atol=1e-6) for one, two in zip(grads, net.parameters()))


@HOW
@pytest.mark.parametrize("make", [wl.Output, wl.Input])
@pytest.mark.parametrize("calls", [[0], [1], (0, 2), [7]])
def test_only_the_calls_that_are_chosen_are_edited(call: Calls, make: Any, calls: Any) -> None:
    """As a hook that counts: the steps of a loop that features are put into, and no other."""
    net, value = Mixed(), x()
    tap = make("often", calls=calls, replace=lambda tensor: tensor * 2, expect="maybe")
    with torch.no_grad():
        out, got = call(net, value, {"edited": tap})
        expected = net.data(value).value + net.table(value)["value"]
        edited = []
        for number in range(3):
            given = expected * 2 if make is wl.Input and number in calls else expected
            expected = net.often(given)
            expected = expected * 2 if make is wl.Output and number in calls else expected
            edited += [given if make is wl.Input else expected] if number in calls else []
    assert same([out], [expected]) and same(got["edited"], edited)


def test_calls_that_are_edited_are_counted_over_the_capture() -> None:
    net, value = Net(), x()
    with wl.capture(net, late=wl.Output("head", calls=[1], replace=torch.zeros_like)) as got, torch.no_grad():
        first, second, third = net(value), net(value), net(value)
    assert same([first], [third]) and not second.any() and same(got["late"], [second])


def test_calls_that_nobody_counts_are_not_edited() -> None:
    net = Net()
    for layer in net.layers:
        layer.compile(backend="eager")
    tap = wl.Output("layers.*.out", calls=[0], replace=torch.zeros_like)
    with pytest.raises(wl.CaptureError, match=r"layers\.0\.out: replace with calls.*compiled by itself"):
        wl.recorder(net, edited=tap)
    value = x()
    edited = wl.recorder(net, edited=wl.Output("layers.2", calls=[0], replace=torch.zeros_like))
    assert same([edited(value)[0]], [net.head(torch.zeros_like(value))])


@pytest.mark.parametrize("kind", [wl.Output, wl.Input])
def test_a_recomputation_is_no_call_that_could_be_edited(kind: Any) -> None:
    """It came after the first call and was taken for the second, which is edited: with other gradients."""
    net, value = Net(), x().requires_grad_()
    (expected,) = torch.autograd.grad(net(value).sum(), value)
    with wl.capture(net, second=kind("layers.1", calls=[1], replace=torch.neg)) as got:
        out = torch.utils.checkpoint.checkpoint(net, value, use_reentrant=False)
        (given,) = torch.autograd.grad(out.sum(), value)
        net(value)
    assert same([given], [expected]) and len(got["second"]) == 1


class Pairs(nn.Module):
    """Gives a tuple, of which an element could be taken from a tensor as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.inner(value)[0] * 2


MISFITS: list[tuple[wl.Output, str, str]] = [
    (wl.Output("inner", replace=lambda pair: pair[0] * 2), "Tensor", "tuple of 2 elements"),
    (wl.Output("inner", replace=lambda pair: 3), "int", "tuple of 2 elements"),
    (wl.Output("inner", index=0, replace=lambda value: 3), "int", "Tensor"),
    (wl.Output("inner", index=0, replace=lambda value: (value,)), "tuple of 1 element", "Tensor"),
    (wl.Output("inner.query", replace=lambda value: [value]), "list of 1 element", "Tensor"),
    (wl.Output("inner.query", replace=lambda value: {"a": value}), r"dict of 1 element \(a\)", "Tensor"),
    (wl.Output("inner.query", tokens=-1, replace=lambda value: [1.0]), "list of 1 element", "Tensor"),
    (wl.Input("inner", replace=lambda value: "zeros"), "str", "Tensor"),
]


@HOW
@pytest.mark.parametrize(("tap", "returned", "given"), MISFITS)
def test_what_cannot_stand_where_it_should_is_refused_at_once(
    call: Calls, tap: wl.Output, returned: str, given: str
) -> None:
    """The model failed later, without a word of the tap, or took the first row of a tensor for the first element."""
    text = rf"tap 'mine', at module '{tap.select}': replace returned {returned} where it was given {given}; return"
    with pytest.raises(TypeError, match=text):
        call(Pairs(), x(), {"mine": tap})


class Tagged(torch.Tensor):
    """A tensor of a class of its own."""


class Takes(nn.Module):
    """Takes and gives whatever ``give`` makes of it."""

    def __init__(self, give: Callable[[Any], Any]) -> None:
        super().__init__()
        self.part = nn.Identity()
        self.give = give

    def forward(self, value: torch.Tensor) -> Any:
        return self.part(self.give(value))


class Held:
    """As a mask of its own class, which a module may take for a tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("give", "replace"),
    [
        (lambda value: value, lambda value: value[:1, :2]),  # another shape
        (lambda value: value, lambda value: value.as_subclass(Tagged)),
        (lambda value: value, nn.Parameter),
        (lambda value: value, lambda value: value > 0),
        (lambda value: value, Held),
        (lambda value: value, lambda value: nn.utils.rnn.pack_padded_sequence(value, [2, 2], batch_first=True)),
        (lambda value: (value, None), lambda value: [value[0]]),
        (lambda value: [value], lambda value: {"value": value[0]}),
        (lambda value: {"value": value}, lambda value: Answer(value["value"])),
        (lambda value: Answer(value), lambda value: (value.value, None)),
        (lambda value: (value,), lambda value: Held(value[0])),
        (lambda value: None, lambda _: torch.ones(2)),
        (lambda value: 3, lambda _: torch.ones(2)),
        (lambda value: Held(value), lambda held: held.value),
        (lambda value: nn.utils.rnn.pack_sequence([value]), lambda packed: packed.data),
    ],
)
def test_what_may_stand_for_another_value(give: Callable[[Any], Any], replace: Callable[[Any], Any]) -> None:
    net = Takes(give)
    returned = []

    def remember(value: Any) -> Any:
        returned.append(replace(value))
        return returned[-1]

    with wl.capture(net, edited=wl.Output("part", replace=remember, expect="maybe")) as got:
        out = net(x())
    assert out is returned[0] and (got["edited"] == () or got["edited"][0] is out)


@HOW
def test_a_part_takes_a_number(call: Calls) -> None:
    _, got = call(Net(), x(), {"edited": wl.Output("layers.1", tokens=-1, replace=lambda _: 0.0)})
    assert not got["edited"][0][:, -1].any()


@HOW
@pytest.mark.parametrize("part", [{}, {"tokens": -1}], ids=str)
@pytest.mark.parametrize("kind", [wl.Output, wl.Input])
def test_an_edit_may_run_its_own_module_again(call: Calls, kind: Any, part: dict[str, Any]) -> None:
    """Which then runs without it; it called itself for ever."""
    net, value = Net(), x()

    def again(given: torch.Tensor) -> torch.Tensor:
        return net.layers[1](given * 2, scale=0.5)

    def expected() -> torch.Tensor:
        state = net.layers[0](value, scale=0.5)
        state = net.layers[1](state, scale=0.5) if kind is wl.Output else state
        edited = state.clone()
        at = (slice(None), -1) if part else ...
        edited[at] = again(state[at])
        return net.head(net.layers[2](edited if kind is wl.Output else net.layers[1](edited, scale=0.5), scale=0.5))

    with torch.no_grad():
        out, got = call(net, value, {"edited": kind("layers.1", replace=again, **part)})
        assert torch.allclose(out, expected(), atol=1e-6)
    assert len(got["edited"]) == 1  # what the edit itself runs is no call of the tap's


@HOW
def test_an_edit_may_run_the_model(call: Calls) -> None:
    """As patching with a second run does, at every layer: none of these runs is edited."""
    net, value, other = Net(), x(), x()

    def patch(given: torch.Tensor) -> torch.Tensor:
        return given + net(other)

    with torch.no_grad():
        out, got = call(net, value, {"edited": wl.Output("layers.*", replace=patch)})
        state, more, expected = value, net(other), []
        for layer in net.layers:
            state = layer(state, scale=0.5) + more
            expected.append(state)
    assert same(got["edited"], expected) and same([out], [net.head(state)])
    assert len(got.forwards("edited")) == 1


def test_other_taps_see_what_an_edit_runs() -> None:
    net, value = Net(), x()
    taps = {
        "edited": wl.Output("layers.1", calls=[1], replace=lambda given: net.layers[1](given * 2)),
        "after": "layers.1",
        "within": "layers.1.out",
        "head": wl.Output("head", replace=torch.neg),
    }
    with torch.no_grad(), wl.capture(net, **taps) as got:
        net(value)
        out = net(value)
    assert [len(got[name]) for name in taps] == [1, 3, 3, 2]
    assert same(got["edited"], got["after"][2:]) and same([out], got["head"][1:])


@pytest.mark.parametrize("nested", [False, True])
def test_two_edits_of_a_module_that_both_run_it(nested: bool) -> None:
    """Taps of one capture, or of two within each other: what the one runs, the other edits, and no more."""
    net, value = Net(), x()
    layer = net.layers[1]
    taps = {
        "first": wl.Output("layers.1", replace=lambda given: layer(given * 2)),
        "second": wl.Output("layers.1", replace=lambda given: layer(given * 3)),
    }
    with torch.no_grad(), contextlib.ExitStack() as stack:
        first = layer(layer(layer(value) * 2) * 3)
        expected = layer(layer(first * 3) * 2)
        for chosen in [{name: tap} for name, tap in taps.items()] if nested else [taps]:
            stack.enter_context(wl.capture(net, **chosen))
        assert same([layer(value)], [expected])


def test_a_failing_edit_rests_no_longer() -> None:
    net, value, calls = Net(), x(), []

    def fail_once(given: torch.Tensor) -> torch.Tensor:
        calls.append(net.layers[1](given))
        if len(calls) == 1:
            raise ZeroDivisionError
        return calls[-1]

    with wl.capture(net, edited=wl.Output("layers.1", replace=fail_once)) as got:
        with pytest.raises(ZeroDivisionError):
            net(value)
        net(value)
    assert len(calls) == 2 and same(got["edited"], calls[1:])


def test_a_context_that_an_edit_copied_is_edited_once_that_is_over() -> None:
    net, value, copied = Net(), x(), []

    def twice(given: torch.Tensor) -> torch.Tensor:
        copied.append(contextvars.copy_context())
        return copied[-1].run(net.layers[1], given) * 2

    with wl.capture(net, edited=wl.Output("layers.1", replace=twice)) as got:
        net(value)
        assert len(copied) == 1
        copied[0].run(net, value)
    assert len(copied) == len(got["edited"]) == 2 and same(got["edited"][:1], got["edited"][1:])


def test_edits_that_run_their_module_in_threads() -> None:
    """Each in its own thread and capture: an edit rests where it runs, and nowhere else."""
    net, value = Net(), x()
    layer = net.layers[1]
    barrier = threading.Barrier(4)

    def work(scale: float) -> torch.Tensor:
        def again(given: torch.Tensor) -> torch.Tensor:
            barrier.wait(60)  # all of them are within their edit
            return layer(given * scale)

        with torch.no_grad(), wl.capture(net, edited=wl.Output("layers.1", replace=again)) as got:
            for _ in range(20):
                net(value)
        assert len(got["edited"]) == 20
        return got["edited"][-1]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        edited = list(pool.map(work, range(4)))
    with torch.no_grad():
        plain = states(net, value)[1]
        assert same(edited, [layer(plain * scale) for scale in range(4)])
