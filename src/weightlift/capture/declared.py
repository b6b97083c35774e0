"""What a model's class declares that it can record, in terms that know no library.

A provider turns a library's own declaration into a `Declaration`. It is imported when a model of its library is
captured, and only then; the library has been imported by then, or there could be no such model.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from weightlift.capture.select import Found, Watch, at, found, nearest, own_taps, remembered, walk
from weightlift.capture.taps import Declared
from weightlift.errors import CaptureError, Problem

# The library's module that defines its models' base class → the provider.
_PROVIDERS = {"transformers.modeling_utils": "weightlift.integrations.transformers.capture"}


@dataclass(frozen=True)
class Scope:
    """A (sub-)model whose forward gathers what is recorded beneath it, up to the next such sub-model.

    Args:
        fqn: its name in the captured model.
        keys: what it records.
        last: attributes of its output, of which the first that exists replaces the last hidden state.
    """

    fqn: str
    keys: tuple[str, ...]
    last: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A module whose output, or its element ``index`` if it is a tuple, belongs to ``key`` of the running scope.

    ``initial``: the first site of a forward also gives its input, before its output.
    """

    fqn: str
    key: str
    index: int
    initial: bool = False


@dataclass(frozen=True)
class Declaration:
    """Scopes and sites of a model, and which scope is meant by a key alone (``""``) or by a prefix (``"encoder"``)."""

    scopes: tuple[Scope, ...]
    sites: tuple[Site, ...]
    aliases: dict[str, str] = field(default_factory=dict)


class Provider(Protocol):
    def declaration(self, model: nn.Module) -> Declaration | None: ...


@dataclass(frozen=True)
class Resolved:
    """Declared taps resolved: for each scope, which of its keys goes to which tap; and the modules by name."""

    scopes: tuple[tuple[Scope, tuple[tuple[str, int], ...]], ...]
    sites: tuple[Site, ...]
    modules: dict[str, nn.Module]


def declaration_of(model: nn.Module) -> Declaration | None:
    """What the class of ``model`` declares, or None. Walks the model."""
    for library, name in _PROVIDERS.items():
        if library in sys.modules:
            provider: Provider = importlib.import_module(name)
            declared = provider.declaration(model)
            if declared is not None:
                return declared
    return None


def resolve(model: nn.Module, taps: Sequence[tuple[int, Declared]], watches: list[Watch]) -> Resolved:
    """The scopes and sites for the numbered ``taps``.

    Raises:
        CaptureError: the model declares nothing, not this, or it is not clear which of its sub-models is meant.
    """
    declared: Declaration | None
    keys = tuple(sorted({tap.key.rpartition(".")[2] for _, tap in taps}))
    selected, declared = remembered(model, ("declared", keys), lambda: _find(model, keys), watches)
    if declared is None:
        raise CaptureError("nothing declared", [_undeclared(model, tap.key) for _, tap in taps])
    chosen: dict[str, list[tuple[str, int]]] = {}
    problems: list[Problem] = []
    for number, tap in taps:
        try:
            fqn, key = _scope_for(model, declared, tap.key)
        except CaptureError as error:
            problems.extend(error.problems)
        else:
            chosen.setdefault(fqn, []).append((key, number))
    if problems:
        raise CaptureError(f"nothing to capture in {type(model).__name__}", problems)
    inside = [fqn + "." if fqn else "" for fqn in chosen]
    # Scopes that were not asked for keep what belongs to them out of those around them.
    scopes = tuple(
        (scope, tuple(chosen.get(scope.fqn, ())))
        for scope in declared.scopes
        if scope.fqn in chosen or any(scope.fqn.startswith(prefix) for prefix in inside)
    )
    used = {key for pairs in chosen.values() for key, _ in pairs}
    sites = tuple(
        site for site in declared.sites if site.key in used and any((site.fqn + ".").startswith(p) for p in inside)
    )
    return Resolved(scopes, sites, {item.fqn: item.module for item in selected})


def _find(model: nn.Module, keys: tuple[str, ...]) -> Found:
    """What is declared, and the modules that give it.

    Looked at by later captures: all but what is inside a module that gives something for ``keys``, and leads to no
    other. A layer within a layer is not looked for again, only found when it was there at first.
    """
    declared = declaration_of(model)
    everything = list(walk(model))
    if declared is None:
        return found([], [item.module for item in everything], None)
    giving = {site.fqn for site in declared.sites if any(key.endswith(site.key) for key in keys)}
    ways = {fqn[:end] for fqn in giving for end, letter in enumerate(fqn) if letter == "."}
    used = {scope.fqn for scope in declared.scopes} | {site.fqn for site in declared.sites}
    visited = [item.module for item in everything if item.fqn in ways or enclosing(item.fqn, giving) not in giving]
    return found([item for item in everything if item.fqn in used], visited, declared)


def enclosing(fqn: str, names: Container[str]) -> str:
    """The nearest of ``names`` that a module has or is within; "" where there is none."""
    while fqn and fqn not in names:
        fqn = fqn.rpartition(".")[0]
    return fqn


def _scope_for(model: nn.Module, declared: Declaration, name: str) -> tuple[str, str]:
    """The scope and the key that a tap's name means."""
    by_name = {scope.fqn: scope for scope in declared.scopes}
    fqn, _, key = name.rpartition(".")
    if fqn:
        if fqn in by_name and key in by_name[fqn].keys:
            return fqn, key
        raise CaptureError("", [_unknown(model, declared, name)])
    for prefix, alias in declared.aliases.items():
        if prefix and name.startswith(prefix + "_") and name[len(prefix) + 1 :] in by_name[alias].keys:
            return alias, name[len(prefix) + 1 :]
    main = declared.aliases.get("")
    if main is not None and name in by_name[main].keys:
        return main, name
    having = [scope.fqn for scope in declared.scopes if name in scope.keys]
    if len(having) == 1:
        return having[0], name
    if not having:
        raise CaptureError("", [_unknown(model, declared, name)])
    hint = f"say which: {', '.join(repr(f'{fqn}.{name}' if fqn else name) for fqn in having)}"
    raise CaptureError("", [Problem(f"several sub-models of {type(model).__name__} record {name!r}", hint=hint)])


def _undeclared(model: nn.Module, name: str) -> Problem:
    """Of a model that has at most taps of its class's own."""
    own = own_taps(model)
    if not own:
        what = f"{name!r}: {type(model).__name__} declares nothing that it can record"
        return Problem(what, hint='select modules: hidden="layers.*"')
    what = f"{name!r}: {type(model).__name__} declares nothing of this name"
    return Problem(what, hint=f"its wl.records knows {', '.join(map(repr, own))}")


def _unknown(model: nn.Module, declared: Declaration, name: str) -> Problem:
    if "*" in name or at(model, name) is not None:
        return Problem(f"{name!r} is not declared", hint=f'modules are given by a name of yours: hidden="{name}"')
    names = sorted({f"{scope.fqn}.{key}" if scope.fqn else key for scope in declared.scopes for key in scope.keys})
    if not names:
        return _undeclared(model, name)
    names += sorted({key for scope in declared.scopes for key in scope.keys})
    near = nearest(name, names)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"it declares {', '.join(names[:12])}"
    return Problem(f"{name!r} is not declared", hint=hint)
