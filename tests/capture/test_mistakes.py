"""Taps and models of a wrong kind are refused by the call that gets them, in words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.capture.nets import Attention, Net, x
from torch import nn

import weightlift as wl

TYPES = [
    (lambda: wl.Output("a", replace=torch.zeros(2)), "wl.Output: replace must be a callable"),
    (lambda: wl.Output("a", replace="zeros"), "replace must be a callable that takes the value; found 'zeros'"),
    (lambda: wl.Output("a", dtype="float16"), "dtype must be a torch.dtype, as torch.float32; found 'float16'"),
    (lambda: wl.Output("a", dtype=float), "dtype must be"),
    (lambda: wl.Input("a", device=1.5), "wl.Input: device must be"),
    (lambda: wl.Output("a", index=1.5), "index must be a position, a name or a callable; found 1.5"),
    (lambda: wl.Output("a", index=(1,)), "index must be"),
    (lambda: wl.Output("a", tokens="last"), "tokens must be"),
    (lambda: wl.Output("a", tokens=1.0), "tokens must be"),
    (lambda: wl.Output("a", detach="yes"), "detach must be True or False"),
    (lambda: wl.Output("a", clone="no"), "clone must be True, False or None"),
    (lambda: wl.Output("a", stop=None), "stop must be"),
    (lambda: wl.Output(3), "wl.Output: expected a pattern.*or a list of these; found 3"),
    (lambda: wl.Output(["a", 3]), "found 3"),
    (lambda: wl.Output(wl.Output("a")), "found Output"),
    (lambda: wl.Declared(Attention), "wl.Declared: key must be a declared name"),
    (lambda: wl.Declared("hidden_states", dtype="float16"), "wl.Declared: dtype must be"),
]


@pytest.mark.parametrize(("make", "text"), TYPES)
def test_options_of_a_wrong_kind(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=text) as caught:
        make()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("call", [wl.capture, wl.recorder])
def test_what_is_no_module(call: Callable[..., Any]) -> None:
    for model in (lambda value: value, "layers.*", None, {"layers": nn.Linear(2, 2)}):
        with pytest.raises(TypeError, match=r"expected the torch\.nn\.Module"):
            call(model, hidden="layers.*")
    with pytest.raises(TypeError, match="build it first"):
        call(Net, hidden="layers.*")


@pytest.mark.parametrize("call", [wl.capture, wl.recorder, lambda _, **taps: wl.records(**taps)])
@pytest.mark.parametrize("empty", [[], (), ["layers.*", []]], ids=str)
def test_an_empty_list_of_selectors(call: Callable[..., Any], empty: Any) -> None:
    with pytest.raises(ValueError, match="the list of selectors is empty; give at least one"):
        call(Net(), hidden=empty)
    with pytest.raises(ValueError, match=r"wl\.Input: the list of selectors is empty"):
        wl.Input(empty)


def test_a_device_that_torch_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"wl\.Output: device 'nowhere'"):
        wl.Output("a", device="nowhere")


def test_an_option_beside_the_tap() -> None:
    text = r"expect is an option of a tap: hidden=wl\.Output"
    with pytest.raises(wl.CaptureError, match=text), wl.capture(Net(), hidden="layers.*", expect="maybe"):
        pass
    with pytest.raises(wl.CaptureError, match="stop is an option"):
        wl.capture(Net(), hidden="layers.*", stop=True)
    net = Net()
    with wl.capture(net, index="layers.*") as got:  # a name like any other, as long as it selects something
        net(x())
    assert len(got["index"]) == 3


def test_numbers_of_other_kinds_are_positions() -> None:
    numpy = pytest.importorskip("numpy")
    net = Net()
    taps = {
        "weights": wl.Output("layers.*.attention", index=numpy.int64(1)),
        "tokens": wl.Output("layers.*", tokens=numpy.int64(-1)),
        "several": wl.Output("layers.*", tokens=numpy.array([0, 2])),
        "tensor": wl.Output("layers.*", tokens=torch.tensor([0, 2])),
        "range": wl.Output("layers.*", tokens=range(2)),
    }
    with wl.capture(net, **taps) as got:
        net(x())
    shapes = {name: tuple(got[name][0].shape) for name in ("tokens", "several", "tensor", "range")}
    assert shapes == {"tokens": (2, 8), "several": (2, 2, 8), "tensor": (2, 2, 8), "range": (2, 2, 8)}


@pytest.mark.parametrize(
    ("tap", "error", "text"),
    [
        (wl.Output("layers.1", tokens=9), IndexError, "index 9 is out of bounds"),
        (wl.Output("layers.*.attention", tokens=-1, replace=torch.neg), TypeError, r"index=…; found tuple of 2 el"),
        (wl.Input("layers.0", replace=lambda value: value @ value), RuntimeError, "mat|size|shape"),
    ],
)
def test_an_option_that_fails_says_whose_it_is(tap: Any, error: type[Exception], text: str) -> None:
    net = Net()
    with pytest.raises(error, match=text) as caught, wl.capture(net, mine=tap):
        net(x())
    if sys.version_info >= (3, 11):
        assert "the capture's tap 'mine', at module 'layers." in caught.value.__notes__[0]


def test_the_model_by_its_forward_alone() -> None:
    """No hook of its own runs then; those of its parts do."""
    net = Net()
    with pytest.raises(wl.CaptureError, match=r"model\.forward\(…\) is called, no hook"), wl.capture(net, output=""):
        net.forward(x())
    with wl.capture(net, layers="layers.*") as got:
        net.forward(x())
    assert len(got["layers"]) == 3


def test_a_module_that_was_called_more_than_once_has_no_single_value() -> None:
    shared = Net()
    shared.layers[2] = shared.layers[0]
    with wl.capture(shared, hidden="layers.*") as got:
        shared(x())
    told = r"layers.0: was called 2 times — .*; wl.Output\(…, calls=\[-1\]\) records the last"
    with pytest.raises(wl.CaptureError, match=told):
        got.named("hidden")
    with wl.capture(shared, hidden=wl.Output("layers.*", calls=[-1])) as got:
        shared(x())
    assert list(got.named("hidden")) == ["layers.1", "layers.0"]
