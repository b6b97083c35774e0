"""Modules that TorchScript made: captured themselves, and nothing inside of them, which runs without hooks."""

import pytest
import torch
from torch import nn

import weightlift as wl

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")
X = torch.ones(1, 8)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, first, second: float = 1.0):
        return self.inner(first) * second


class Around(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.part(x))


PARTS = {
    "scripted": lambda: torch.jit.script(Scaled()),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(Scaled()).eval()),
    "traced": lambda: torch.jit.trace(Scaled(), X),
}


def captured(model, tap):
    with wl.capture(model, taken=tap) as got:
        output = model(X)
    return output, got


def recorded(model, tap):
    return wl.recorder(model, taken=tap)(X)


def compiled(model, tap):
    torch._dynamo.reset()
    return torch.compile(wl.recorder(model, taken=tap), backend="eager")(X)


WAYS = {"capture": captured, "recorder": recorded, "compiled recorder": compiled}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("part", PARTS)
def test_a_model_that_is_one(part, way):
    model = PARTS[part]()
    output, got = way(model, "")
    assert torch.equal(got["taken"][0], output) and torch.equal(output, model(X)) and not model._forward_hooks


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("tap", ["*", ["last", "part"], wl.Output(["part", "last"])], ids=str)
def test_one_among_others(part, tap, way):
    model = Around(PARTS[part]())
    output, got = way(model, tap)
    calls = got.calls("taken")
    assert torch.equal(calls["part"][0], model.part(X)) and torch.equal(calls["last"][0], output)
    assert not model.part._forward_hooks and torch.equal(output, model(X))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("index", [0, "first"])
def test_its_arguments_by_place_and_by_name(part, index, way):
    _, got = way(Around(PARTS[part]()), wl.Input("part", index=index))
    assert torch.equal(got["taken"][0], X)


@pytest.mark.parametrize("part", PARTS)
def test_its_output_is_edited(part, way):
    model = Around(PARTS[part]())
    output, _ = way(model, wl.Output("part", replace=torch.zeros_like))
    assert torch.equal(output, model.last(torch.zeros(1, 8)))


@pytest.mark.parametrize("tap", ["part.inner", "**", wl.Output("**", expect="maybe"), wl.Input("part.*")], ids=str)
@pytest.mark.parametrize("part", ["scripted", "traced"])
def test_what_lies_inside_can_not_be_seen(part, tap, way):
    with pytest.raises(wl.CaptureError, match=r"part\.inner: tap 'taken' lies inside a TorchScript module") as caught:
        way(Around(PARTS[part]()), tap)
    assert "take 'part' itself" in str(caught.value)


@pytest.mark.parametrize("part", ["scripted", "traced"])
def test_what_lies_inside_a_model_that_is_one(part, way):
    with pytest.raises(wl.CaptureError, match="take the model itself"):
        way(PARTS[part](), "inner")


def test_a_recorder_follows_modes_around_one():
    model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Dropout(1.0))
    record = torch.compile(wl.recorder(model, taken="*"), backend="eager")
    for training in (True, False, True):
        model.train(training)
        output, got = record(X)
        assert bool((output == 0).all()) == training
        assert torch.equal(got["taken"][1], output) and torch.equal(got["taken"][0], model[0](X))
