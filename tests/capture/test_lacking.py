"""A module that runs and does not give what a tap takes: the same refusal, eager, compiled and for `wl.records`."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.capture.nets import WIDTH, Net, x
from torch import nn

import weightlift as wl

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("nothing_compiled")]
Calls = Callable[[nn.Module, torch.Tensor, dict[str, Any]], Any]


def eager(model: nn.Module, value: torch.Tensor, taps: dict[str, Any]) -> Any:
    with wl.capture(model, **taps) as got:
        model(value)
    return got


def recorded(model: nn.Module, value: torch.Tensor, taps: dict[str, Any]) -> Any:
    return wl.recorder(model, **taps)(value)[1]


def compiled(model: nn.Module, value: torch.Tensor, taps: dict[str, Any]) -> Any:
    got = torch.compile(wl.recorder(model, **taps), backend="eager", fullgraph=True)(value)[1]
    assert isinstance(got["x"], tuple)
    return got


def by_layers(model: nn.Module, value: torch.Tensor, taps: dict[str, Any]) -> Any:
    for layer in getattr(model, "layers", model).children():
        layer.compile(backend="eager")
    got = wl.recorder(model, **taps)(value)[1]
    assert isinstance(got["x"], tuple)
    return got


HOW = pytest.mark.parametrize("call", [eager, recorded, compiled, by_layers])


class Block(nn.Module):
    """Attention that gives weights or None in their place, and more that can be missing."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.cache = Maybe(weights)
        self.weights = weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(x, x, x, need_weights=self.weights)[0]
        return self.cache(x)["value"]


class Maybe(nn.Module):
    def __init__(self, gives: bool) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, x: torch.Tensor, mask: None = None) -> dict[str, torch.Tensor | None]:
        return {"value": x + 1, "extra": x if self.gives else None}


def blocks(*weights: bool) -> nn.Sequential:
    return nn.Sequential(*(Block(given) for given in weights))


@HOW
def test_an_element_that_is_none(call: Calls) -> None:
    taps = {
        "x": wl.Output("*.attn", index=1),
        "named": wl.Output("*.cache", index="extra"),
        "called": wl.Output("*.cache", index=lambda output: output["extra"]),
    }
    with pytest.raises(wl.CaptureError) as caught:
        call(blocks(True, False), x(), taps)
    problems = caught.value.problems
    assert [problem.fqn for problem in problems] == ["1.attn", "1.cache", "1.cache"]
    assert all("is None" in problem.what for problem in problems)
    assert "index 1" in str(problems[0]) and "tuple of 2 elements" in str(problems[0])
    assert "eager" in str(problems[0]) and "need_weights=True" in str(problems[0])
    assert "'extra'" in str(problems[1]) and "dict of 2 elements" in str(problems[1])
    assert "eager" not in str(problems[1]), "that is for attention"


@HOW
@pytest.mark.parametrize("expect", ["some", "maybe"])
def test_none_where_it_is_allowed(call: Calls, expect: Any) -> None:
    tap = wl.Output("*.attn", index=1, expect=expect)
    got = call(blocks(True, False, True), x(), {"x": tap})
    assert list(got.named("x")) == ["0.attn", "2.attn"]
    if expect == "maybe":
        assert call(blocks(False), x(), {"x": tap})["x"] == ()
        return
    with pytest.raises(wl.CaptureError, match=r"0\.attn: .*is None"):
        call(blocks(False), x(), {"x": tap})


@HOW
def test_a_field_of_an_output_of_transformers_that_is_none(call: Calls) -> None:
    """Such an output is a mapping that leaves the field out."""
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Gives(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return outputs.BaseModelOutput(last_hidden_state=x + 1)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Gives()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).last_hidden_state

    with pytest.raises(wl.CaptureError, match=r"element that is None.*'attentions'.*of 1 element "):
        call(Outer(), x(), {"x": wl.Output("model", index="attentions")})
    assert call(Outer(), x(), {"x": wl.Output("model", index="attentions", expect="maybe")})["x"] == ()
    with pytest.raises(wl.CaptureError, match=r"isn't there.*'logits'"):
        call(Outer(), x(), {"x": wl.Output("model", index="logits", expect="maybe")})


@HOW
def test_none_is_no_value_to_edit_and_counts_as_a_call(call: Calls) -> None:
    edit = wl.Output("*.attn", index=1, replace=torch.neg)
    with pytest.raises(wl.CaptureError, match=r"0\.attn: .*is None"):
        call(blocks(False), x(), {"x": edit})
    chosen = wl.Output("*.attn", index=1, calls=[1], expect="maybe")
    block = blocks(True)[0]
    got = call(nn.Sequential(block, block), x(), {"x": chosen})
    assert len(got["x"]) == 1


def test_none_in_a_call_that_is_not_wanted() -> None:
    net = Maybe(gives=False)
    with wl.capture(net, x=wl.Output("", index="extra", calls=[1])) as got:
        net(x())
        net.gives = True
        net(x())
    assert len(got["x"]) == 1
    with pytest.raises(wl.CaptureError, match="is None"), wl.capture(net, x=wl.Output("", index="extra", calls=[0])):
        net.gives = False
        net(x())


def test_what_a_failed_forward_lacked_is_dropped() -> None:
    net = blocks(False)
    hook = net.register_forward_hook(lambda *_: 1 // 0)
    with wl.capture(net, x=wl.Output("*.attn", index=1)) as got:
        with pytest.raises(ZeroDivisionError):
            net(x())
        hook.remove()
        net[0].weights = True
        net(x())
    assert len(got["x"]) == 1


def test_none_ends_a_forward_that_is_to_be_left() -> None:
    net = blocks(False, False)
    ran = []
    net[1].register_forward_pre_hook(lambda *_: ran.append(1))
    with wl.capture(net, x=wl.Output("0.attn", index=1, stop=True, expect="maybe")) as got:
        net(x())
    assert got["x"] == () and not ran


def test_an_argument_that_is_none_is_what_the_module_was_given() -> None:
    net = Maybe(gives=True)
    with wl.capture(net, mask=wl.Input("", index="mask")) as got:
        net(x(), mask=None)
    assert got["mask"] == (None,)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_records_of_a_forward_refuse_none(backend: str | None) -> None:
    class Records(nn.Sequential):
        @wl.records(weights=wl.Output("*.attn", index=1))
        def forward(self, value: torch.Tensor) -> Any:
            return super().forward(value)

    net = Records(*blocks(False))
    whole: Any = torch.compile(net, backend=backend) if backend else net
    with pytest.raises(wl.CaptureError, match=r"0\.attn: tap 'weights' .*is None.*index 1"):
        whole(x(), output_weights=True)


@HOW
def test_every_module_that_lacks_an_element_is_told_of_once_and_truly(call: Calls) -> None:
    net = Net()
    taps = {
        "x": wl.Output("layers.*", index=1),
        "named": wl.Output("head", index="logits"),
        "passed": wl.Input("head", index="mask"),
        "far": wl.Input("head", index=3),
    }
    with pytest.raises(wl.CaptureError) as caught:
        call(net, x(), taps)
    problems = caught.value.problems
    assert [problem.fqn for problem in problems] == ["layers.0", "layers.1", "layers.2", "head", "head", "head"]
    text = str(caught.value)
    assert "Tensor, which has no positions" in text and "Tensor without that attribute" in text
    assert "argument that isn't passed" in text and "a call with 1 positional argument" in text
    for untrue in ("recorded nothing", "did not", "compiled", "ran"):
        assert not any(untrue in str(problem) for problem in problems), untrue
    assert "whole output" not in str(problems[-1]), "an argument is no output"


def test_the_calls_of_a_generation_are_told_of_once() -> None:
    net = Net()
    with pytest.raises(wl.CaptureError) as caught, wl.capture(net, x=wl.Output("layers.*", index=1)):
        for _ in range(5):
            net(x())
    assert len(caught.value.problems) == 3


class Table:
    """Has elements by names only."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return {"value": torch.ones(2)}[name]

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(("make", "index"), [(UserDict, 2), (UserDict, -3), (lambda *_: Table(), 0)])
def test_a_position_in_what_has_only_keys(make: Callable[..., Any], index: int) -> None:
    class Gives(nn.Module):
        def forward(self, value: torch.Tensor) -> Any:
            return make({"first": value, "second": value * 2})

    net = nn.Sequential(Gives())
    with pytest.raises(wl.CaptureError, match="takes an element that isn't there"):
        eager(net, torch.ones(2), {"x": wl.Output("0", index=index)})
    if make is UserDict:  # as in a dictionary
        assert torch.equal(eager(net, torch.ones(2), {"x": wl.Output("0", index=1)})["x"][0], torch.ones(2) * 2)


class Spreads(nn.Module):
    """Gives its layer several tensors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: torch.Tensor, **more: Any) -> Any:
        return self.layer(value, value * 2, **more)


class Adds(nn.Module):
    def forward(self, *tensors: torch.Tensor, scale: Any = 1.0) -> torch.Tensor:
        return sum(tensors) * scale  # type: ignore[return-value]


@pytest.mark.parametrize("call", [eager, recorded, compiled])
def test_what_comes_after_any_number_of_arguments_has_no_position(call: Calls) -> None:
    value = torch.ones(2)
    for index in ("scale", "tensors"):
        with pytest.raises(wl.CaptureError, match="takes an argument that isn't passed"):
            call(Spreads(Adds()), value, {"x": wl.Input("layer", index=index)})
    assert torch.equal(call(Spreads(Adds()), value, {"x": wl.Input("layer", index=1)})["x"][0], value * 2)
    with (
        pytest.raises(wl.CaptureError, match="takes an argument that isn't passed"),
        wl.capture(net := Spreads(Adds()), x=wl.Input("layer", index=2)),
    ):
        net(value, scale=value)


@pytest.mark.parametrize("call", [eager, recorded, compiled])
def test_arguments_of_a_forward_that_was_set_on_the_instance(call: Calls) -> None:
    def other(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first - second

    def passes_on(*args: Any, **kwargs: Any) -> Any:
        return torch.add(*args, **kwargs)

    class Takes(nn.Module):
        def forward(self, second: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            return second

    value = torch.ones(2)
    for forward, name in (
        (other, "second"),
        (functools.wraps(other)(lambda *args: other(*args)), "second"),
        (passes_on, "first"),
    ):
        net = Spreads(Takes())
        net.layer.forward = forward  # type: ignore[assignment]
        assert torch.equal(call(net, value, {"x": wl.Input("layer", index=name)})["x"][0], value * 2)
