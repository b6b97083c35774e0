"""What a model's class declares, gathered while its forward runs: by hooks, and by the twins of compiled code."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from weightlift.capture.actions import Action, Likely, in_order, likely
from weightlift.capture.checkpointing import unseen
from weightlift.capture.declared import Scope, Site
from weightlift.capture.forwards import Forward
from weightlift.capture.result import Entry, no_such_layers, places, undeclared
from weightlift.capture.session import Session, backward_id
from weightlift.capture.taps import Declared
from weightlift.capture.values import Absent, Recipe, finish, recipe_of, take, untouched, version_of

_NONE = object()
_LAST = frozenset({"hidden_states"})  # the key whose last value may be an attribute of the output


class Gather(Action):
    """A (sub-)model with declared outputs: what its sites gave becomes entries when its forward ends."""

    gathers = True

    def __init__(
        self, scope: Scope, pairs: tuple[tuple[str, int], ...], taps: dict[int, Declared], sites: Sequence[int] = ()
    ) -> None:
        self.scope = scope
        self.sites = {number: site for (_, number), site in zip(pairs, sites)}
        # With what is done to a value, if anything is.
        self.taps = [(key, number, taps[number], _work(recipe_of(taps[number]))) for key, number in pairs]
        self.keys = frozenset(key for key, _ in pairs)
        self.attached = any(not tap.detach for _, _, tap, _ in self.taps)
        # Per key, what is wanted from the front and how much from the end, if no tap wants all of it.
        self.limits = {key: _limits([tap for other, _, tap, _ in self.taps if other == key]) for key in self.keys}
        self.wanted_whole = frozenset(key for key, limits in self.limits.items() if limits is None)
        self.own: dict[int, GiveDeclared] = {}  # by the ids of modules, what belongs to it, in the model's order
        # The number of the tap, if there is one alone that takes all as it is.
        number, tap, work = self.taps[0][1:] if len(self.taps) == 1 else (0, None, None)
        self.only = number if tap is not None and tap.layers is None and work is None else None
        # See `Forward`: until a key has got its first argument, and from then on.
        self.simple: dict[int, Action] = {}
        self.simple_later: dict[int, Action] = {}
        self.likely: Likely | None = None
        self.expected: list[GiveDeclared] = []
        self.expected_first: list[GiveFirst | None] = []

    def simplify(self, sole: dict[int, Action], places: Mapping[int, int]) -> None:
        """``sole``: by the ids of modules, what is done at those where one thing is done. ``places``: see `likely`."""
        whole = {
            id_: action
            for id_, action in sole.items()
            if isinstance(action, GiveDeclared) and action.key in self.wanted_whole
        }
        self.simple = {id_: action for id_, action in whole.items() if action.first is None}
        begun = {action.key for action in whole.values() if action.first is not None}
        self.simple_later = dict(whole if len(begun) == 1 else self.simple)
        due = in_order({id_: action for id_, action in self.own.items() if action is whole.get(id_)})
        self.likely = likely([places[id_] for id_ in due])
        self.expected = [self.own[id_] for id_ in due]
        self.expected_first = [None] * len(due)
        for place, action in enumerate(self.expected):
            if action.first is not None:
                self.expected_first[place] = action.first
                break

    def enter(self, session: Session, module: nn.Module, args: Any, kwargs: Any) -> None:
        if backward_id() == -1 or not session.recomputing(self.scope.fqn):
            session.begin(self, sys._getframe(2), is_root=False)

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        forward = None if session.in_backward() else session.end(self)
        if forward is None or forward.gathered is None or not self.taps:
            return output
        try:
            self._keep(session, forward, forward.gathered, output)
        except BaseException:  # what is done to the values failed, and with it the forward
            session.drop(forward)
            raise
        return output

    def _keep(self, session: Session, forward: Forward, lists: dict[str, list[Entry]], output: Any) -> None:
        """Makes entries of what was gathered."""
        given = forward.raw
        forward.forget()
        if self.only is not None:
            self._give(session, forward, given, output)
            return
        for action, value, version, number in given:
            lists.setdefault(action.key, []).append(Entry(-1, action.fqn, value, number, version))
            session.gives(action.fqn, number)
        for tap, entries, lacking in self.gathered(lists, output):
            if lacking is not None:
                self._lacks(session, tap, *lacking)
            for entry in entries:
                entry.forward = forward.number
            session.entries.extend(entries)
            session.fired[self.sites[tap]].append(forward.root)

    def _give(self, session: Session, forward: Forward, given: Sequence[Any], output: Any) -> None:
        """The usual case: one tap takes all as it is."""
        tap, number = self.only, forward.number
        assert tap is not None
        entries = [Entry(tap, action.fqn, value, number, version) for action, value, version, _ in given]
        session.gave.setdefault(number, set()).update([entry.fqn for entry in entries])
        if entries and self.keys == _LAST:
            last = self._last_of(output)
            if last is not _NONE:
                entries[-1] = Entry(tap, entries[-1].fqn, last, number, version_of(last))
        session.entries.extend(entries)
        session.fired[self.sites[tap]].append(forward.root)

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
            if key in _LAST and entries and (value := self._last_of(output)) is not _NONE:
                last = entries[-1]
                entries[-1] = Entry(last.tap, last.fqn, value, last.forward, _version(value))
            lacking = None
            if tap.layers is not None:
                count = len(entries)
                wanted, missing = places(tap.layers, count)
                if missing and tap.expect != "maybe":
                    lacking = missing, count
                entries = [entry for place, entry in enumerate(entries) if place in wanted]
            if recipe is None:
                entries = [_taken(entry, number) for entry in entries]
            else:
                entries = [_finished(entry, number, recipe) for entry in entries]
            result.append((number, entries, lacking))
        return result

    def _last_of(self, output: Any) -> Any:
        for attribute in self.scope.last:
            value = getattr(output, attribute, _NONE)
            if value is not _NONE:
                return value
        return _NONE


def _work(recipe: Recipe) -> Recipe | None:
    return None if untouched(recipe) else recipe


def _taken(entry: Entry, number: int) -> Entry:
    if entry.tap >= 0:  # another tap has it
        return Entry(number, entry.fqn, entry.value, None, entry.version)
    entry.tap = number
    return entry


def _finished(entry: Entry, number: int, recipe: Recipe) -> Entry:
    with unseen():
        value = finish(entry.value, recipe)
    version = entry.version if value is entry.value else _version(value)
    return Entry(number, entry.fqn, value, None, version)


def _limits(taps: list[Declared]) -> tuple[frozenset[int], int] | None:
    if any(tap.layers is None for tap in taps):
        return None
    layers = [layer for tap in taps for layer in tap.layers or ()]
    return frozenset(layer for layer in layers if layer >= 0), -min([0, *layers])


class GiveFirst(Action):
    """The first argument of a module, which belongs to a key before any output does."""

    __slots__ = ("fqn", "key")

    def __init__(self, site: Site) -> None:
        self.key = site.key
        self.fqn = f"{site.fqn}:input"


class GiveDeclared(Action):
    """A module whose output belongs to a key of the sub-model that is running.

    Where a module has no other action, and all is wanted, the hook itself does what `leave` does.
    """

    __slots__ = ("first", "fqn", "hidden", "index", "key", "site", "wants_kwargs")

    def __init__(self, site: Site, wants_kwargs: bool) -> None:
        self.site = site
        self.fqn = site.fqn
        self.key = site.key
        self.index = site.index
        self.first = GiveFirst(site) if site.initial else None
        self.hidden = site.key == "hidden_states"
        self.wants_kwargs = wants_kwargs

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # As little as can be: `Gather.leave` does the rest, and does it at one go.
        forward = session.gathering()
        if forward is None:
            return output
        if backward_id() != -1 and session.recomputing(self.fqn):
            return output
        gather: Gather = forward.owner
        if self.key not in gather.wanted_whole:
            if self.key in gather.keys:
                self._select(session, forward, args, kwargs, output)
            return output
        value = output
        try:
            if self.first is not None:
                self.begin(forward, args[0] if args else first_of(args, kwargs))
            if isinstance(output, tuple):
                value = output[self.index]
        except (Absent, IndexError):
            session.problems.append(undeclared(self.key, self.fqn, self.index, found_in(args, kwargs, output)))
            return output
        if value is None and (self.hidden or output is not None):
            session.gives(self.fqn, forward.number)
            return output
        if session.grad and gather.attached and not torch.is_grad_enabled():
            session.notice_checkpoint(self.fqn, edits=False)
        version = version_of(value)
        forward.raw.append((self, value, version, forward.number))
        forward.passed(module)
        return output

    def begin(self, forward: Forward, first: Any) -> None:
        """Notes the first argument, unless a value of the key has come."""
        if self.key not in [action.key for action, *_ in forward.raw]:
            forward.raw.append((self.first, first, _version(first), forward.number))
        forward.has_begun()

    def _select(self, session: Session, forward: Forward, args: Any, kwargs: Any, output: Any) -> None:
        """Where no tap wants all that belongs to the key."""
        gather: Gather = forward.owner
        lists: dict[str, list[Entry]] = forward.gathered  # type: ignore[assignment]
        try:
            gave = gather_site(self.site, lists, gather, args, kwargs, output)
        except Absent as error:
            session.problems.append(undeclared(self.key, self.fqn, self.index, str(error)))
            return
        session.gives(self.fqn, forward.number)
        if gave and session.grad and gather.attached and not torch.is_grad_enabled():
            session.notice_checkpoint(self.fqn, edits=False)


def given(site: Site, output: Any) -> Any:
    """Of what a module returned, what belongs to the site."""
    return take(output, site.index) if isinstance(output, tuple) else output


def first_of(args: Any, kwargs: Any) -> Any:
    """The first argument of a call. Raises `Absent`."""
    for value in (*args, *kwargs.values()):
        return value
    raise Absent("no argument")


def found_in(args: Any, kwargs: Any, output: Any) -> str:
    """What a message says of a call that lacks what is declared of it."""
    if not args and not kwargs:
        return "no positional argument"
    return f"{type(output).__name__} of {len(output)} elements" if isinstance(output, tuple) else type(output).__name__


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
        values[late].version = -1


def _version(value: Any) -> Any:
    """That of a value; -1 in code that is being traced."""
    return -1 if is_dynamo_compiling() else version_of(value)
