"""Tensors that somebody outside the module has too: a load leaves them as ``load_state_dict`` and ``to`` would."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import weightlift as wl

VALUE = torch.tensor([0.1, 1.1, 2.1])  # none of them a bfloat16
Make = Callable[[dict[str, torch.Tensor]], nn.Module]


class Module(nn.Module):
    pass


def buffer(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    outside["t"] = outside.get("t", torch.zeros(3))
    module.register_buffer("a", outside["t"])
    return module


def transient(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    module.register_buffer("a", outside.setdefault("t", VALUE * 3), persistent=False)
    return module


def parameter(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    module.a = nn.Parameter(outside.setdefault("t", torch.zeros(3)))
    return module


def frozen_parameter(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    module.a = outside.setdefault("t", nn.Parameter(torch.zeros(3), requires_grad=False))
    return module


def view(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    module.register_buffer("a", outside.setdefault("t", torch.zeros(5))[1:4])
    return module


def viewed(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    whole = torch.zeros(3)
    module.register_buffer("a", whole)
    outside["t"] = whole[1:]
    return module


def transient_viewed(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    whole = VALUE * 3
    module.register_buffer("a", whole, persistent=False)
    outside["t"] = whole[1:]
    return module


def listed(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    outside["t"] = torch.zeros(3)
    module.register_buffer("a", outside["t"])
    module.tables = [outside["t"]]
    return module


def trained(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    module.register_buffer("a", outside.setdefault("t", torch.zeros(3, requires_grad=True)))
    return module


def whole_numbers(outside: dict[str, torch.Tensor]) -> nn.Module:
    module = Module()
    module.register_buffer("a", outside.setdefault("t", torch.zeros(3, dtype=torch.int64)))
    return module


MAKES: list[Make] = [
    buffer, transient, parameter, frozen_parameter, view, viewed, transient_viewed, listed, trained, whole_numbers,
]  # fmt: skip
GIVEN: dict[Make, Callable[[], torch.Tensor]] = {  # what the module finds outside, where it did not make it itself
    buffer: lambda: torch.zeros(3),
    transient: lambda: VALUE * 3,
    parameter: lambda: torch.zeros(3),
    frozen_parameter: lambda: nn.Parameter(torch.zeros(3), requires_grad=False),
    view: lambda: torch.zeros(5),
    trained: lambda: torch.zeros(3, requires_grad=True),
    whole_numbers: lambda: torch.zeros(3, dtype=torch.int64),
}


def by_torch(make: Make, outside: dict[str, torch.Tensor], state: dict[str, torch.Tensor], dtype: Any) -> nn.Module:
    module = make(outside)
    module.load_state_dict(state, strict=False)
    return module if dtype is None else module.to(dtype)


def deferred(make: Make, outside: dict[str, torch.Tensor], state: dict[str, torch.Tensor], dtype: Any) -> nn.Module:
    return wl.load(lambda: make(outside), state, dtype=dtype, strict=False)


def built(make: Make, outside: dict[str, torch.Tensor], state: dict[str, torch.Tensor], dtype: Any) -> nn.Module:
    return wl.load(lambda: make(outside), state, dtype=dtype, strict=False, defer=False)


def existing(make: Make, outside: dict[str, torch.Tensor], state: dict[str, torch.Tensor], dtype: Any) -> nn.Module:
    return wl.load(make(outside), state, dtype=dtype, strict=False)


def seen(module: nn.Module, outside: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What can be observed of both sides."""
    inner, outer = module.a, outside["t"]
    assert isinstance(inner, torch.Tensor)
    return {
        "the same": inner is outer,
        "one memory": inner.untyped_storage().data_ptr() == outer.untyped_storage().data_ptr(),
        "in a list": [item is inner for item in getattr(module, "tables", ())],
        **{
            name: (tensor.dtype, tensor.detach().tolist(), tensor.requires_grad, type(tensor))
            for name, tensor in (("inner", inner), ("outer", outer))
        },
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("offered", [True, False])
@pytest.mark.parametrize("load", [deferred, built, existing])
@pytest.mark.parametrize("make", MAKES)
def test_is_left_as_torch_leaves_it(make: Make, load: Any, offered: bool, dtype: torch.dtype | None) -> None:
    state = {"a": VALUE.clone()} if offered and not make.__name__.startswith("transient") else {}
    results = []
    for way in (by_torch, load):
        outside = {"t": GIVEN[make]()} if make in GIVEN else {}
        results.append(seen(way(make, outside, state, dtype), outside))
    assert results[0] == results[1]


def test_table_of_a_cache_is_not_recast() -> None:
    @functools.lru_cache
    def table() -> torch.Tensor:
        return torch.arange(3.0)

    def make(outside: dict[str, torch.Tensor]) -> nn.Module:
        module = Module()
        module.register_buffer("a", table(), persistent=False)
        return module

    first = wl.load(lambda: make({}), {}, dtype=torch.bfloat16)  # within which the table was made
    second = wl.load(lambda: make({}), {})
    assert first.a.dtype == torch.bfloat16
    assert table().dtype == torch.float32
    assert second.a is table()


def test_ties_among_buffers_stay_though_torch_parts_them() -> None:
    mean = torch.zeros(3)

    def make() -> nn.Module:
        module = Module()
        module.child = Module()
        module.register_buffer("a", mean)
        module.child.register_buffer("a", mean)
        return module

    loaded = wl.load(make, {"a": VALUE}, dtype=torch.bfloat16)
    assert loaded.a is loaded.child.a
    assert (loaded.a.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(mean, VALUE)


@pytest.mark.parametrize("defer", [True, False])
def test_views_of_an_outer_memory_move_together(defer: bool) -> None:
    outer = torch.zeros(6)

    def make() -> nn.Module:
        module = Module()
        module.register_buffer("a", outer)
        module.register_buffer("b", outer[:3], persistent=False)
        module.c = nn.Parameter(outer[3:])
        return module

    value = torch.cat([VALUE, VALUE])
    loaded = wl.load(make, {"a": value}, dtype=torch.bfloat16, strict=False, defer=defer)
    assert outer.dtype == torch.float32
    assert torch.equal(outer, value)
    assert torch.equal(loaded.a, value.bfloat16())
    loaded.a.zero_()
    assert not loaded.b.any() and not loaded.c.any()
    assert torch.equal(outer, value)


def test_plan_for_a_module_that_exists_can_be_executed_again_after_a_cast() -> None:
    mean = torch.zeros(3)
    module = Module()
    module.register_buffer("a", mean)
    state = {"a": VALUE.clone()}
    plan = wl.plan(module, state, dtype=torch.bfloat16)
    plan.execute()
    cast = module.a
    mean.zero_()
    state["a"].mul_(2)
    plan.execute()
    assert module.a is cast  # it has the plan's dtype by now, and is filled in place
    assert torch.equal(cast, (VALUE * 2).bfloat16())
    assert not mean.any()


@pytest.mark.parametrize("make", [buffer, view, parameter])
def test_value_of_a_wider_dtype_is_not_rounded_on_its_way(make: Make) -> None:
    outside = {"t": GIVEN[make]().bfloat16()}
    loaded = wl.load(lambda: make(outside), {"a": VALUE}, dtype="auto")
    assert torch.equal(loaded.a, VALUE)
    assert outside["t"].dtype == torch.bfloat16
    assert torch.equal(outside["t"][outside["t"] != 0], VALUE.bfloat16())


def test_part_of_a_made_table_that_is_held_elsewhere_keeps_the_checkpoint_s_values() -> None:
    kept: list[torch.Tensor] = []

    def make() -> nn.Module:
        module = Module()
        kept.append(torch.randn(5).mul_(2)[1:4])
        module.register_buffer("a", kept[0])
        return module

    wl.load(make, {"a": VALUE}, dtype=torch.bfloat16)
    assert torch.equal(kept[0], VALUE)
