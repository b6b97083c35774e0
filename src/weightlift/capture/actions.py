"""What the hooks do at a module of an open capture: take inputs and outputs, follow forwards, gather declared ones."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from weightlift.capture.declared import Scope, Site
from weightlift.capture.result import Entry, absent, no_such_layers, places
from weightlift.capture.select import original
from weightlift.capture.session import Session, backward_id, running
from weightlift.capture.taps import Declared, Output
from weightlift.capture.values import Absent, Recipe, edit, finish, put, recipe_of, take, untouched


class Action:
    """What happens at a module: before it runs, after it ran, or both. Shared by all captures that want the same."""

    __slots__ = ()

    def enter(self, session: Session, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns edited arguments or None."""
        raise NotImplementedError

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Returns the output, edited or as it is."""
        raise NotImplementedError


class Root(Action):
    """The captured model itself: marks its forwards, and those of its own declared outputs."""

    __slots__ = ("gather",)

    def __init__(self, gather: Gather | None) -> None:
        self.gather = gather

    def enter(self, session: Session, module: nn.Module, args: Any, kwargs: Any) -> None:
        if backward_id() != -1 and session.recomputing(""):
            return
        forward = session.begin(self, gathers=False)
        if self.gather is not None:
            session.begin(self.gather, gathers=True, within=forward)

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        session.end(self)
        return output


class Tapping:
    """What is the same for all modules of one tap."""

    __slots__ = ("calls", "every", "kept_last", "name", "number", "recipe", "untouched", "whole")

    def __init__(self, number: int, name: str, tap: Output) -> None:
        self.number = number
        self.name = name
        self.recipe = recipe = recipe_of(tap)
        self.calls = tap.calls
        self.kept_last = -min([0, *(tap.calls or ())])
        self.every = tap.calls is None
        self.whole = recipe.index is None and recipe.replace is None
        self.untouched = untouched(recipe)


class TakeOutput(Action):
    """One tap at one module."""

    __slots__ = ("fqn", "site", "tap")

    def __init__(self, tap: Tapping, fqn: str, site: int) -> None:
        self.tap = tap
        self.fqn = fqn
        self.site = site

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tap = self.tap
        recomputing = backward_id() != -1 and session.recomputing(self.fqn)
        value = output
        if not tap.whole:
            try:
                value = take(output, tap.recipe.index)
                if tap.recipe.replace is not None:
                    session.notice_checkpoint(self.fqn, edits=True)
                    value = edit(value, tap.recipe)
                    output = put(output, tap.recipe.index, value)
            except Absent as error:
                session.problems.append(absent(tap.name, self.fqn, tap.recipe.index, str(error)))
                return output
        if not recomputing:
            self.record(session, value)
        return output

    def record(self, session: Session, value: Any) -> None:
        # A model's own work drives this out of the caches between any two calls: few functions, few lookups.
        tap = self.tap
        if session.grad and not tap.recipe.detach and not torch.is_grad_enabled():
            session.notice_checkpoint(self.fqn, edits=False)
        root = running.get()
        if root is None or root.session is not session or root.gathered is not None:
            root = session.root()
        fired = session.fired[self.site]
        call = len(fired)
        fired.append(root)
        if tap.every or tap.kept_last or call in tap.calls:  # type: ignore[operator]
            kept = value if tap.untouched else finish(value, tap.recipe)
            version = kept._version if isinstance(kept, torch.Tensor) and not kept.is_inference() else -1
            entry = Entry(tap.number, self.fqn, kept, root, version, call)
            session.entries.append(entry)
            if tap.kept_last:
                self._let_go(session, entry)
        if session.wanted is not None:
            session.arrived(tap.number, self.fqn)

    def _let_go(self, session: Session, entry: Entry) -> None:
        """Of the calls that are counted from the end, only as many are kept as may still be wanted."""
        last = session.last.setdefault(self.site, deque())
        last.append(entry)
        if len(last) > self.tap.kept_last:
            old = last.popleft()
            if self.tap.calls is not None and old.call not in self.tap.calls:
                session.entries.remove(old)


class TakeInput(TakeOutput):
    """One tap at one module, before it runs."""

    __slots__ = ()

    def enter(self, session: Session, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tap = self.tap
        recomputing = backward_id() != -1 and session.recomputing(self.fqn)
        try:
            place = argument_place(original(module), tap.recipe.index, args, kwargs)
        except Absent as error:
            session.problems.append(absent(tap.name, self.fqn, tap.recipe.index, str(error)))
            return None
        edited = None
        value = take_argument(place, args, kwargs)
        if tap.recipe.replace is not None:
            session.notice_checkpoint(self.fqn, edits=True)
            value = edit(value, tap.recipe)
            edited = put_argument(place, args, kwargs, value)
        if not recomputing:
            self.record(session, value)
        return edited


def argument_place(module: nn.Module, index: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where an argument stands: its position or its key; a callable index sees all of them. Raises `Absent`."""
    if callable(index):
        return index
    names = _parameters(type(module).forward)
    if index is None:
        index = 0
    if isinstance(index, int):
        if index < 0:
            index += len(args)
        if 0 <= index < len(args):
            return index
        if 0 <= index < len(names) and names[index] in kwargs:
            return names[index]
    elif index in kwargs:
        return index
    elif index in names and names.index(index) < len(args):
        return names.index(index)
    raise Absent(f"{len(args)} arguments" + (f" and {', '.join(kwargs)}" if kwargs else ""))


def take_argument(place: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(place, int):
        return args[place]
    return kwargs[place] if isinstance(place, str) else place((args, kwargs))


def put_argument(place: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
    if isinstance(place, int):
        return put(args, place, value), kwargs
    return args, {**kwargs, place: value}


@functools.lru_cache(maxsize=512)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


class Gather(Action):
    """A (sub-)model with declared outputs: what its sites gave becomes entries when its forward ends."""

    def __init__(
        self, scope: Scope, pairs: tuple[tuple[str, int], ...], taps: dict[int, Declared], sites: Sequence[int] = ()
    ) -> None:
        self.scope = scope
        self.sites = {number: site for (_, number), site in zip(pairs, sites)}
        self.taps = [(key, number, taps[number], recipe_of(taps[number])) for key, number in pairs]
        self.keys = frozenset(key for key, _ in pairs)
        self.attached = any(not tap.detach for _, _, tap, _ in self.taps)
        # Per key, what is wanted from the front and how much from the end, if no tap wants all of it.
        self.limits = {key: _limits([tap for other, _, tap, _ in self.taps if other == key]) for key in self.keys}

    def enter(self, session: Session, module: nn.Module, args: Any, kwargs: Any) -> None:
        if backward_id() == -1 or not session.recomputing(self.scope.fqn):
            session.begin(self, gathers=True)

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        forward = session.end(self)
        if forward is not None and forward.gathered is not None and self.taps:
            root = forward.root
            for number, entries, lacking in self.gathered(forward.gathered, output):
                if lacking is not None:
                    self._lacks(session, number, *lacking)
                for entry in entries:
                    entry.forward = root or forward
                session.entries.extend(entries)
                session.fired[self.sites[number]].append(root)
        return output

    def _lacks(self, session: Session, number: int, missing: list[int], count: int) -> None:
        key = next(key for key, other, _, _ in self.taps if other == number)
        problem = no_such_layers(key, self.scope.fqn, missing, count)
        if problem not in session.problems:
            session.problems.append(problem)

    def gathered(
        self, lists: dict[str, list[Entry]], output: Any
    ) -> list[tuple[int, list[Entry], tuple[list[int], int] | None]]:
        """For each tap its entries of the forward that ended with ``output``, and which layers it lacks of how many."""
        result = []
        for key, number, tap, recipe in self.taps:
            entries = lists.get(key, [])
            if key == "hidden_states" and entries and self.scope.last:
                entries = [*entries[:-1], self._last(entries[-1], output)]
            lacking = None
            if tap.layers is not None:
                count = len(entries)
                wanted, missing = places(tap.layers, count)
                if missing and tap.expect != "maybe":
                    lacking = missing, count
                entries = [entry for place, entry in enumerate(entries) if place in wanted]
            result.append((number, [_finished(entry, number, recipe) for entry in entries], lacking))
        return result

    def _last(self, entry: Entry, output: Any) -> Entry:
        for attribute in self.scope.last:
            if hasattr(output, attribute):
                value = getattr(output, attribute)
                return Entry(-1, entry.fqn, value, None, _version(value))
        return entry


def _finished(entry: Entry, number: int, recipe: Recipe) -> Entry:
    value = entry.value
    if untouched(recipe):
        return Entry(number, entry.fqn, value, None, entry.version)
    value = finish(value, recipe)
    version = entry.version if value is entry.value else _version(value)
    return Entry(number, entry.fqn, value, None, version)


def _limits(taps: list[Declared]) -> tuple[frozenset[int], int] | None:
    if any(tap.layers is None for tap in taps):
        return None
    layers = [layer for tap in taps for layer in tap.layers or ()]
    return frozenset(layer for layer in layers if layer >= 0), -min([0, *layers])


class GiveDeclared(Action):
    """A module whose output belongs to a key of the sub-model that is running."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        forward = running.get()
        if forward is None or forward.session is not session or forward.gathered is None:
            forward = session.gathering()
        site = self.site
        if forward is None or (backward_id() != -1 and session.recomputing(site.fqn)):
            return output
        gather: Gather = forward.owner  # type: ignore[assignment]
        lists: dict[str, list[Entry]] = forward.gathered  # type: ignore[assignment]
        if site.key in gather.keys:
            try:
                gave = gather_site(site, lists, gather, args, kwargs, output)
            except Absent as error:
                session.problems.append(absent(site.key, site.fqn, site.index, str(error)))
                return output
            session.gave.add(site.fqn)
            if gave and session.grad and gather.attached and not torch.is_grad_enabled():
                session.notice_checkpoint(site.fqn, edits=False)
        return output


def given(site: Site, output: Any) -> Any:
    """Of what a module returned, what belongs to the site."""
    return take(output, site.index) if isinstance(output, tuple) else output


def first_of(args: Any, kwargs: Any) -> Any:
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))


def gather_site(site: Site, lists: dict[str, list[Entry]], gather: Gather, args: Any, kwargs: Any, output: Any) -> bool:
    """Adds what a module gives to the running sub-model's lists, as Transformers' own capture does."""
    values = lists.setdefault(site.key, [])
    limits = gather.limits[site.key]
    if site.initial and not values:
        first = first_of(args, kwargs)
        values.append(Entry(-1, f"{site.fqn}:input", first, None, _version(first)))
        if limits is not None:
            _let_go(values, limits)
    value = given(site, output)
    if value is None and (site.key == "hidden_states" or isinstance(output, tuple)):
        return False
    values.append(Entry(-1, site.fqn, value, None, _version(value)))
    if limits is not None:
        _let_go(values, limits)
    return True


def _let_go(values: list[Entry], limits: tuple[frozenset[int], int]) -> None:
    """Of what no tap can want any more, only the entry stays, without its value."""
    front, from_end = limits
    late = len(values) - 1 - from_end
    if late >= 0 and late not in front:
        values[late].value = None


def _version(value: Any) -> int:
    """Counts in-place writes; -1 where torch does not, and in code that is being traced."""
    if not is_dynamo_compiling() and isinstance(value, torch.Tensor) and not value.is_inference():
        return value._version
    return -1
