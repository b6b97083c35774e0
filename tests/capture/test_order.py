"""Layers that run in the order of their names are recorded in a shorter way: those that do not give the same."""

from __future__ import annotations

import contextvars
import copy
import gc
import itertools
import weakref
from collections.abc import Iterator

import pytest
import torch
from tests.capture.nets import Layer, Net, hooks_on, same, x
from torch import nn
from transformers import LlamaConfig, LlamaModel

import weightlift as wl


class InOrder(nn.ModuleList):
    """Layers that are gone through in another order than they stand in."""

    order: tuple[int, ...] = ()

    def __getitem__(self, index: object) -> object:
        return [self._modules[str(n)] for n in self.order] if isinstance(index, slice) else super().__getitem__(index)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self._modules[str(n)] for n in self.order])


def llama(layers: int = 4) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval()
    model.config.use_cache = False
    return model


def ids() -> torch.Tensor:
    return torch.randint(3, 99, (2, 6))


@torch.no_grad()
def test_any_order_and_any_number_of_calls() -> None:
    net = Net()
    net.layers = InOrder(net.layers)
    seen: list[torch.Tensor] = []
    for layer in net.layers._modules.values():
        layer.register_forward_hook(lambda *a: seen.append(a[2]))
    for order in (*itertools.permutations(range(3)), (0, 1, 1, 2), (0, 0, 1, 2), (0, 1, 2, 0, 1, 2), (2, 2, 1, 0, 0)):
        net.layers.order = order
        seen.clear()
        with wl.capture(net, hidden="layers.*") as got:
            net(x())
            net(x())
        assert same(got["hidden"], seen)
        assert [len(values) for values in got.forwards("hidden")] == [len(order)] * 2
        assert {fqn: len(calls) for fqn, calls in got.calls("hidden").items()} == {
            f"layers.{n}": 2 * order.count(n) for n in order
        }


@torch.no_grad()
@pytest.mark.parametrize(
    "order", [(0, 2, 1, 3), (0, 1, 1, 2, 3), (0, 1, 2, 3, 0, 1, 2, 3), (0, 3, 2, 1), (0, 0, 0, 1, 2, 3)]
)
@pytest.mark.parametrize("names", [("hidden_states",), ("hidden_states", "attentions")])
def test_declared_outputs_in_any_order(order: tuple[int, ...], names: tuple[str, ...]) -> None:
    model, value = llama(), ids()
    model.layers = InOrder(model.layers)
    model.layers.order = order
    theirs = copy.deepcopy(model)(value, **{f"output_{name}": True for name in names})
    for _ in range(2):
        with wl.capture(model, *names) as got:
            model(value)
        for name in names:
            assert same(got[name], getattr(theirs, name)), name


@torch.no_grad()
def test_each_name_belongs_to_its_value() -> None:
    model, value = llama(), ids()
    seen: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *a, name=f"layers.{number}": seen.update({name: a[2]}))
    with wl.capture(model, wl.Declared("hidden_states")) as got:
        out = model(value)
    seen["layers.3"] = out.last_hidden_state
    named = got.named("hidden_states")
    assert list(named) == ["layers.0:input", *seen]
    assert all(named[name] is tensor for name, tensor in seen.items())


@torch.no_grad()
@pytest.mark.parametrize("declared", [False, True])
def test_inference_tensors_in_an_ordinary_forward(declared: bool) -> None:
    model, value = llama(), ids()
    for layer in model.layers:
        layer.register_forward_hook(lambda *a: torch.inference_mode()(torch.clone)(a[2]))
    taken = wl.Declared("hidden_states") if declared else wl.Output("layers.*")
    with wl.capture(model, hidden_states=taken) as got:
        out = model(value)
    assert got["hidden_states"][1].is_inference()
    assert len(got["hidden_states"]) == 4 + declared
    assert torch.equal(got["hidden_states"][-1], out.last_hidden_state) is declared


@torch.no_grad()
def test_a_declared_value_that_was_written_to() -> None:
    model, value = llama(), ids()

    def write(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].add_(1)

    with wl.capture(model, "hidden_states"):
        model(value)
    model.layers[2].register_forward_pre_hook(write)
    with pytest.raises(wl.CaptureError, match="clone=True") as caught, wl.capture(model, "hidden_states"):
        model(value)
    assert [problem.fqn for problem in caught.value.problems] == ["layers.1"]


@torch.no_grad()
def test_what_other_captures_want_stays() -> None:
    """Hooks and what torch keeps beside them, while captures with other choices on the same modules come and go."""
    net = Net()
    taps = {
        "a": "layers.*",
        "b": wl.Input(Layer),
        "c": wl.Output("layers.1", detach=True),
        "d": wl.Input("layers.2", index="scale"),
    }
    for closing in itertools.permutations(taps):
        captures = {name: wl.capture(net, **{name: tap}) for name, tap in taps.items()}
        for capture in captures.values():
            capture.__enter__()
        net(x())
        for place, name in enumerate(closing):
            captures[name].__exit__(None, None, None)
            left = set(closing[place + 1 :])
            for number, layer in enumerate(net.layers):
                outputs = "a" in left or ("c" in left and number == 1)
                inputs = "b" in left or ("d" in left and number == 2)
                assert bool(layer._forward_hooks) is outputs
                assert bool(layer._forward_pre_hooks) is inputs
                assert bool(layer._forward_pre_hooks_with_kwargs) is inputs
        assert hooks_on(net) == 0


@torch.no_grad()
def test_hooks_that_were_cleared_come_back_with_the_next_capture() -> None:
    net = Net()
    outer = wl.capture(net, hidden=wl.Output("layers.*", expect="maybe"))
    outer.__enter__()
    for layer in net.layers:
        layer._forward_hooks.clear()
    with wl.capture(net, hidden=wl.Output("layers.*", expect="maybe")) as got:
        net(x())
    assert len(got["hidden"]) == 3
    outer.__exit__(None, None, None)
    assert hooks_on(net) == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["hidden_states", "layers"])
def test_hooks_of_another_context_add_nothing(name: str) -> None:
    model, value = llama(), ids()
    context = contextvars.Context()
    others = wl.capture(model, everything=wl.Output("**", expect="maybe"))
    context.run(others.__enter__)
    taken = wl.Declared(name) if name == "hidden_states" else wl.Output("layers.*")
    with wl.capture(model, taken=taken) as got:
        model(value)
    context.run(others.__exit__, None, None, None)
    layers = [f"layers.{n}" for n in range(4)]
    assert list(got.named("taken")) == (["layers.0:input", *layers] if name == "hidden_states" else layers)
    assert hooks_on(model) == 0


@torch.no_grad()
def test_a_layer_that_did_not_run_is_not_waited_for_afterwards() -> None:
    net, contexts = Net(), []
    net.layers = InOrder(net.layers)
    net.layers.order = (0, 1)
    net.layers._modules["1"].register_forward_hook(lambda *_: contexts.append(contextvars.copy_context()))
    with wl.capture(net, hidden=wl.Output("layers.*", expect="maybe")) as got:
        net(x())
    assert len(got["hidden"]) == 2 and len(contexts) == 1
    last = weakref.ref(net.layers._modules["2"])
    del net
    gc.collect()
    assert last() is None
