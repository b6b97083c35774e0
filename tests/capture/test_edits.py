"""What a ``replace`` function may return, for captures and compiled recorders alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.capture.nets import Mixed, Net, same, states, x
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
