"""Mappings whose tensors lie in the memory that a load writes: what arrives is what they held when it began."""

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.transfer import apart as apart_module

SIZE = 1500  # more than one piece of work


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(SIZE, SIZE, bias=False)
        self.b = nn.Linear(SIZE, SIZE, bias=False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Two()


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("workers", [1, 8])
def test_two_weights_are_swapped(model, workers):
    old, state = values(model), model.state_dict()
    wl.load(model, {"a.weight": state["b.weight"], "b.weight": state["a.weight"]}, workers=workers)
    assert torch.equal(model.a.weight, old["b.weight"]) and torch.equal(model.b.weight, old["a.weight"])


@pytest.mark.parametrize("workers", [1, 8])
def test_a_mapping_of_names_swaps_a_models_own_weights(model, workers):
    old = values(model)
    swap = {"a.weight": "b.weight", "b.weight": "a.weight"}
    wl.load(model, model.state_dict(), key_mapping=swap.get, workers=workers)
    assert torch.equal(model.a.weight, old["b.weight"]) and torch.equal(model.b.weight, old["a.weight"])


@pytest.mark.parametrize(
    "view",
    [lambda weight: weight.t(), lambda weight: weight.flip(0), lambda weight: weight.double(),
     lambda weight: torch._neg_view(weight), lambda weight: weight[:1].expand(SIZE, SIZE)],
    ids=["transposed", "flipped", "cast", "negated", "expanded"],
)  # fmt: skip
def test_a_weight_becomes_a_view_of_itself(model, view):
    wanted, other = view(model.a.weight.detach()).clone(), model.b.weight.detach().clone()
    wl.load(model, {"a.weight": view(model.a.weight.detach()), "b.weight": model.b.weight})
    assert torch.equal(model.a.weight, wanted.float()) and torch.equal(model.b.weight, other)


def test_parts_that_are_shifted_within_one_storage():
    base = torch.arange(4000.0)
    model = nn.Module()
    model.register_buffer("low", base[:3000])
    wl.load(model, {"low": base[1000:]})
    assert torch.equal(model.low, torch.arange(1000.0, 4000.0))


def test_what_a_parameter_on_meta_takes_is_not_written_under_it(model):
    old = values(model)
    with torch.device("meta"):
        model.c = nn.Linear(SIZE, SIZE, bias=False)
    a, b = model.a.weight, model.b.weight
    wl.load(model, {"a.weight": b, "b.weight": a, "c.weight": a})
    assert torch.equal(model.c.weight, old["a.weight"]) and torch.equal(model.b.weight, old["a.weight"])
    assert torch.equal(model.a.weight, old["b.weight"])
    places = {parameter.data_ptr() for parameter in model.parameters()}
    assert len(places) == 3, "two parameters would be tied by accident"


def test_a_models_own_state_is_not_copied(model, monkeypatch):
    old = values(model)
    copies = []
    copied = apart_module._copied
    monkeypatch.setattr(apart_module, "_copied", lambda *args: copies.append(args) or copied(*args))
    wl.load(model, model.state_dict())
    assert not copies
    assert all(torch.equal(parameter, old[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_tensors_made_in_inference_mode_give_parameters_that_can_be_trained(existing, within):
    with torch.inference_mode():
        state = {"weight": torch.ones(3, 3), "bias": torch.ones(3)}
    build = lambda: nn.Linear(3, 3)  # noqa: E731
    with torch.inference_mode(within):
        model = wl.load(build() if existing and not within else build, state)
    if not existing:
        assert model.weight.data_ptr() == state["weight"].data_ptr(), "copied without need"
    model(torch.ones(2, 3, requires_grad=True)).sum().backward()
    with torch.no_grad():
        model.weight.add_(1)
    assert model.weight.grad is not None and not model.weight.is_inference()
