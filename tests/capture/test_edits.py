"""What a ``replace`` function may return, for captures and compiled recorders alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.capture.nets import Net, same, states, x
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
