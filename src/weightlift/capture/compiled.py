"""Recorders on models whose layers were compiled one by one.

What such a layer returns is taken outside of its compiled code, which stays the user's own. What lies inside needs code
of its own: a function that takes the layer as an argument, so that layers of one kind share what is compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from weightlift.capture.declared import Site
from weightlift.capture.gathering import gather_site
from weightlift.capture.regions import compiled_in_place
from weightlift.capture.select import compiled_wrapper, original
from weightlift.capture.twin import Sites, Take, Twin, arrived, build_twin, with_own_code
from weightlift.errors import CaptureError, Problem
from weightlift.locks import Lock


class Regions:
    """A twin for eager calls whose compiled parts stay compiled. ``sites`` are keyed by the ids of originals."""

    def __init__(self, root: nn.Module, sites: dict[int, Sites], cell: Any) -> None:
        self._cell = cell
        self._sites = sites
        self._runners: dict[Any, tuple[Callable[..., Any], Any]] = {}
        outside: dict[int, Sites] = {}
        self._inside: dict[int, dict[int, Sites]] = {}
        self._divide(root, None, outside, set())
        for module in self._inside:
            outside.setdefault(module, Sites([]))
        self._root = root
        self._outside = outside
        self._inner: list[Twin] = []  # of what lies inside compiled modules
        self._lock = Lock()
        self._twins: dict[tuple[bool, ...], Twin] = {}
        twin = build_twin(root, outside, cell, None, self._forward_of)
        self._originals = (*twin.originals, *(module for inner in self._inner for module in inner.originals))
        self._twins[self._flags()] = twin

    def twin(self) -> Twin | None:
        """The twin for the modes that the model is in now; None if its structure changed."""
        flags = self._flags()
        with self._lock.own:
            twin = self._twins.get(flags)
            if twin is None:
                twin = self._twins[flags] = build_twin(self._root, self._outside, self._cell, None, self._forward_of)
        return twin if twin.stands() and all(inner.stands() for inner in self._inner) else None

    def _flags(self) -> tuple[bool, ...]:
        return tuple([module.training for module in self._originals])

    def _divide(self, outer: nn.Module, region: int | None, outside: dict[int, Sites], seen: set[int]) -> None:
        """What lies in no compiled module, and for each outermost compiled module what lies inside."""
        module = original(outer)
        if id(module) in seen:
            return
        seen.add(id(module))
        own = self._sites.get(id(module))
        if own is not None and region is None:
            outside[id(module)] = own
        elif own is not None and region is not None:
            self._inside.setdefault(region, {})[id(module)] = own
        if region is None and (compiled_wrapper(outer) or compiled_in_place(outer) or compiled_in_place(module)):
            region = id(module)
        for child in module._modules.values():
            if child is not None:
                self._divide(child, region, outside, seen)

    def _forward_of(self, outer: nn.Module, copied: nn.Module) -> Callable[..., Any] | None:
        module = original(outer)
        if not (compiled_wrapper(outer) or compiled_in_place(outer) or compiled_in_place(module)):
            return None
        # The user's own hooks on a compiled module run with it, not again around it.
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            copied.__dict__[name] = type(copied.__dict__[name])()
        inside = self._inside.get(id(module))
        if inside is None:
            return outer.__call__
        return self._inner_forward(outer, inside)

    def _inner_forward(self, outer: nn.Module, inside: dict[int, Sites]) -> Callable[..., Any]:
        module = original(outer)
        takes: list[Take] = []
        held: dict[tuple[str, str], Site] = {}
        relative: dict[int, Sites] = {}
        # Layers of one kind share code, so what stands for a place must not be its name, which differs. A sub-model
        # that gathers for itself has code of its own, and needs the names.
        named = any(sites.gather is not None for sites in inside.values())
        for key, sites in inside.items():
            # Takes count downwards: numbers from zero are those of the taps that a sub-model gathers for.
            own = [replace(take, number=-1 - len(takes) - n, fqn="") for n, take in enumerate(sites.takes)]
            takes += sites.takes
            early = [take for take in sites.takes if take.recipe.calls is not None]
            if early:
                what = "replace with calls, inside a layer that was compiled by itself, where nobody counts its calls"
                hint = "edit what the layer itself takes or returns, or compile the recorder instead of the layers"
                raise CaptureError("this can't be edited", [Problem(what, fqn=take.fqn, hint=hint) for take in early])
            places = [site if named else replace(site, fqn=str(len(held))) for site in sites.declared or ()]
            held.update(((place.fqn, site.key), site) for place, site in zip(places, sites.declared or ()))
            relative[key] = Sites(own, sites.gather, places, held=True)
        kind = type(module), tuple((repr(take.recipe), take.before) for take in takes), tuple(held)
        if kind not in self._runners:
            inner_cell: Any = threading.local()
            self._runners[kind] = _compile_like(outer, _runner(inner_cell)), inner_cell
        runner, inner_cell = self._runners[kind]
        twin = build_twin(module, relative, inner_cell, None)
        self._inner.append(twin)
        cell = self._cell

        def forward(*args: Any, **kwargs: Any) -> Any:
            output, entries, given = runner(twin.root, args, kwargs)
            for number, fqn, value in entries:
                if number >= 0:
                    cell.entries.append((number, fqn, value))
                else:
                    take = takes[-1 - number]
                    cell.entries.append((take.number, take.fqn, value))
                    arrived(cell, take)
            for fqn, key, first, value in given:
                running, lists = cell.scopes[-1] if cell.scopes else (None, {})
                if running is not None and key in running.keys:
                    gather_site(held[fqn, key], lists, running, (first,), {}, value)
            return output

        return forward


def _runner(cell: Any) -> Callable[..., Any]:
    def run_layer(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        entries: list[Any] = []
        held: list[Any] = []
        cell.entries = entries
        cell.held = held
        cell.scopes = []
        cell.left = None
        output = layer(*args, **kwargs)
        cell.entries = []
        cell.held = []
        return output, entries, held

    # What another recorder compiled, or this one before it was refreshed, is not to be found.
    return with_own_code(run_layer, run_layer.__name__)


def _compile_like(outer: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles as the user compiled ``outer``: with the same backend and options."""
    context = getattr(outer, "dynamo_ctx", None) if compiled_wrapper(outer) else None
    if context is None:
        compiled: Any = original(outer)._compiled_call_impl
        code = getattr(compiled, "__code__", None)
        cells = dict(zip(code.co_freevars, compiled.__closure__ or ())) if code is not None else {}
        context = cells["self"].cell_contents if "self" in cells else None
    if callable(context):
        return context(function)  # type: ignore[no-any-return]
    return torch.compile(function)
