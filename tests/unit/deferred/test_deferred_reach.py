"""Modules whose state-dict code cannot get at them are not doubled, and are loaded as before."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.deferred import rewrite as rewriting
from weightlift.deferred.doubles import Doubles
from weightlift.deferred.reach import needs_double
from weightlift.deferred.recorder import Recorder

Hook = Callable[..., Any]


class Module(nn.Linear):
    def blind(self, state: Any, prefix: str, *rest: Any) -> None:
        if prefix + "old" in state:
            state[prefix + "weight"] = state.pop(prefix + "old")

    def seeing(self, state: Any, prefix: str, *rest: Any) -> None:
        if self.bias is None:
            state.clear()

    def by_super(self, *rest: Any) -> None:
        super().extra_repr()

    def by_locals(self, *rest: Any) -> None:
        locals()["self"].eval()

    def by_frame(self, *rest: Any) -> None:
        sys._getframe().f_locals["self"].eval()

    def by_inspect(self, *rest: Any) -> None:
        inspect.currentframe()

    def by_closure(self, *rest: Any) -> Any:
        return [self for _ in rest] or (lambda: self)

    def by_star(*rest: Any) -> None:
        rest[0].eval()

    def by_deletion(self, *rest: Any) -> None:
        del self

    def generating(self, *rest: Any) -> Any:
        yield from rest


def of_module(module: nn.Module, state: Any, *rest: Any) -> None:
    assert isinstance(module, nn.Module)


def of_state(module: nn.Module, state: Any, *rest: Any) -> None:
    state.pop("nothing", None)


def plain(state: Any, *rest: Any, by: Any = None) -> None:
    state.pop("nothing", None)


def closing_over(value: Any) -> Hook:
    def hook(state: Any, *rest: Any) -> None:
        state.pop(str(type(value)), None)

    return hook


class Called:
    def __call__(self, *args: Any) -> None:
        pass


MODULE = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("hook", "with_module", "wanted"),
    [
        (lambda module: module.blind, False, False),
        *((lambda module, name=name: getattr(module, name), False, True) for name in (
            "seeing", "by_super", "by_locals", "by_frame", "by_inspect", "by_closure", "by_star", "by_deletion",
            "generating",
        )),
        (lambda module: of_state, True, False),
        (lambda module: of_module, True, True),
        (lambda module: plain, False, False),
        (lambda module: functools.partial(plain), False, True),
        (lambda module: functools.partial(plain, by=module), False, True),
        (lambda module: closing_over("weight"), False, False),
        (lambda module: closing_over({"a": 1}), False, False),
        (lambda module: closing_over(module), False, True),
        (lambda module: closing_over(MODULE), False, True),
        (lambda module: closing_over(module.weight), False, True),
        (lambda module: closing_over(module.blind), False, True),
        (lambda module: closing_over(plain), False, True),
        (lambda module: lambda state, *rest, by=module: by.eval(), False, True),
        (lambda module: lambda state, prefix, a, b, c, d, e, by=module: by.eval(), False, True),
        (lambda module: Called(), False, False),
        (lambda module: Called(), True, True),
        (lambda module: MODULE.register_forward_hook, False, True),
    ],
)  # fmt: skip
def test_which_hooks_reach_their_module(hook: Hook, with_module: bool, wanted: bool) -> None:
    module = Module(2, 2)
    module._register_load_state_dict_pre_hook(hook(module), with_module)
    assert needs_double(module) is wanted


def test_overrides_and_post_hooks_reach_theirs() -> None:
    class Overriding(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)

    module = Module(2, 2)
    module.register_load_state_dict_post_hook(lambda module, keys: None)
    assert needs_double(Overriding(2, 2)) and needs_double(module, post=True) and not needs_double(module)
    assert needs_double(nn.LazyLinear(2))


def made_doubles(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    made: list[nn.Module] = []
    of = Doubles.of

    def noted(self: Doubles, module: nn.Module) -> nn.Module:
        made.append(module)
        return of(self, module)

    monkeypatch.setattr(Doubles, "of", noted)
    return made


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(20)])
        self.layers[3].weight = self.layers[7].weight
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self._register_load_state_dict_pre_hook(self.rename)

    def rename(self, state: Any, prefix: str, *rest: Any) -> None:
        for key in [key for key in state if "old." in key]:
            state[key.replace("old.", "layers.")] = state.pop(key)
        state[f"{prefix}layers.0.bias"] = state[f"{prefix}layers.0.bias"] * 2


def test_a_hook_of_the_state_alone_doubles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {key.replace("layers.1", "old.1"): torch.randn_like(value) for key, value in Root().state_dict().items()}
    state["layers.3.weight"] = state["layers.7.weight"]
    ordinary = Root()
    ordinary.load_state_dict(state)
    wanted = ordinary.state_dict()
    made = made_doubles(monkeypatch)
    for build in (Root, Root()):
        got = wl.load(build, state).state_dict()
        assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert made == []
    reaching = Root()
    reaching.register_load_state_dict_pre_hook(of_module)
    got = wl.load(reaching, state).state_dict()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted) and len(made) > 20


class Tables(nn.Module):
    def __init__(self, table: tuple[Any, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(20)])
        for layer in self.layers:
            layer.table = table
        self.register_load_state_dict_pre_hook(of_module)


def test_a_table_that_modules_share_is_gone_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count, mapped = 0, Doubles._map

    def counted(self: Doubles, value: Any) -> Any:
        nonlocal count
        count += 1
        return mapped(self, value)

    module = Tables(tuple(range(1000)))
    monkeypatch.setattr(Doubles, "_map", counted)
    wl.load(module, {key: value + 1 for key, value in module.state_dict().items()})
    assert 1000 < count < 3000


def test_a_double_costs_few_calls_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, dispatch = 0, Recorder._dispatch

    def counted(self: Recorder, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return dispatch(self, *args)

    module = Tables(())
    state = {key: value + 1 for key, value in module.state_dict().items()}
    monkeypatch.setattr(Recorder, "_dispatch", counted)
    wl.load(module, state)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert calls <= 2 * len(state)


# -- torch's older spectral norm --------------------------------------------------------------------------------------


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 2)), nn.utils.spectral_norm(nn.Conv1d(2, 2, 1), "weight"))


VERSIONS = [None, {}, *({"spectral_norm": item} for item in ({}, {"weight.version": 1}, {"weight.version": 0}))]
CHANGES = [(), ("weight_v",), ("weight_u",), ("weight_orig", "weight_u"), ("weight_v", "+weight")]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("left_out", CHANGES)
def test_spectral_norm_is_loaded_as_torch_loads_it(
    version: Any, left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    from_torch = spectral()
    state = from_torch.state_dict()
    for name in left_out:
        if name.startswith("+"):
            state[f"0.{name[1:]}"] = torch.randn(2, 3)
        else:
            del state[f"0.{name}"]
    metadata = {"version": 1} | (version or {})
    state._metadata = None if version is None else {"0": metadata, "1": {"spectral_norm": {"weight.version": 1}}}
    missing, unexpected = from_torch.load_state_dict(copy.deepcopy(state), strict=False)
    rehearsed: list[object] = []
    begin = rewriting._Rehearsal._walk
    monkeypatch.setattr(rewriting._Rehearsal, "_walk", lambda self: (rehearsed.append(self), begin(self)))
    plan = wl.plan(spectral(), copy.deepcopy(state), strict=False)
    assert set(plan.report.missing_keys) == set(missing)
    assert set(plan.report.unexpected_keys) == set(unexpected)
    got, wanted = plan.execute().state_dict(), from_torch.state_dict()
    for key in wanted.keys() - set(missing):
        torch.testing.assert_close(got[key], wanted[key])  # `weight_v` may be computed
    new = (version or {}).get("spectral_norm", {}).get("weight.version")
    assert (rehearsed == []) == (new == 1 or (new is None and not left_out))
