"""What the hooks do at a module of an open capture: take inputs and outputs, and follow the model's forwards."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from weightlift.capture.checkpointing import unseen
from weightlift.capture.edits import Misfit, edit, edits
from weightlift.capture.forwards import resting
from weightlift.capture.result import Entry, out_of_reach
from weightlift.capture.select import original, scripted
from weightlift.capture.session import Session, backward_id
from weightlift.capture.taps import Output
from weightlift.capture.values import Lack, beyond, finish, pick, put, reached, recipe_of, take, untouched, version_of

_NO_CALL = -1  # what is computed again counts as none


class Action:
    """What happens at a module: before it runs, after it ran, or both. Shared by all captures that want the same.

    The hooks call it, and torch calls the hooks, so two frames up is the call of the module.
    """

    __slots__ = ()
    wants_kwargs = False

    def enter(self, session: Session, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns edited arguments or None."""
        raise NotImplementedError

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Returns the output, edited or as it is."""
        raise NotImplementedError


Likely: TypeAlias = "Callable[[Sequence[nn.Module]], tuple[nn.Module, ...]]"


def likely(places: Sequence[int]) -> Likely | None:
    """What takes out of the modules of a session, which stand at the places of the template, those that are due."""
    return operator.itemgetter(*places) if len(places) > 1 else None


def in_order(actions: Mapping[int, Any]) -> list[int]:
    """The keys of what is done at modules, which are in the model's order, in that in which modules return."""
    done: list[int] = []
    running: list[tuple[int, str]] = []
    for key, action in actions.items():
        while running and not action.fqn.startswith(running[-1][1] + "."):
            done.append(running.pop()[0])
        running.append((key, action.fqn))
    return done + [key for key, _ in reversed(running)]


class Root(Action):
    """The captured model itself: marks its forwards, which are those of its own declared outputs, too."""

    __slots__ = ("expected", "expected_first", "gather", "likely", "simple")
    gathers = False
    attached = True

    def __init__(self, gather: Action | None) -> None:
        self.gather = gather  # where the model's own class declares something
        self.simple: dict[int, Action] = {}  # see `Forward`
        self.likely: Likely | None = None
        self.expected: list[Any] = []
        self.expected_first: list[Any] = []

    def simplify(self, sole: dict[int, Action], places: Mapping[int, int]) -> None:
        """``sole``: by the ids of modules, what is done at those where one thing is done. ``places``: see `likely`."""
        self.simple = {key: action for key, action in sole.items() if isinstance(action, TakeWhole)}
        keys = in_order(self.simple)
        self.likely = likely([places[key] for key in keys])
        self.expected = [self.simple[key] for key in keys]
        self.expected_first = [None] * len(keys)

    def enter(self, session: Session, module: nn.Module, args: Any, kwargs: Any) -> None:
        if backward_id() != -1 and session.recomputing(""):
            return
        session.begin(self.gather or self, sys._getframe(2), is_root=True)

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.gather is None and not session.in_backward():  # else that has just ended it; or it was not begun
            session.end(self)
        return output


class Tapping:
    """What is the same for all modules of one tap."""

    __slots__ = ("calls", "edits", "every", "kept_last", "name", "number", "plain", "recipe", "untouched", "whole")

    def __init__(self, number: int, name: str, tap: Output) -> None:
        self.number = number
        self.name = name
        self.recipe = recipe = recipe_of(tap)
        self.calls = tap.calls
        self.edits = recipe.replace is not None  # and while it does, it rests: see `resting`
        self.kept_last = -min([0, *(tap.calls or ())])
        self.every = tap.calls is None
        self.whole = recipe.index is None and recipe.replace is None
        self.untouched = untouched(recipe)
        self.plain = self.every and self.whole and self.untouched


class TakeOutput(Action):
    """One tap at one module."""

    __slots__ = ("fqn", "site", "tap")

    def __init__(self, tap: Tapping, fqn: str, site: int) -> None:
        self.tap = tap
        self.fqn = fqn
        self.site = site

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tap = self.tap
        if tap.edits and tap.number in resting(session):
            return output
        recomputing = backward_id() != -1 and session.recomputing(self.fqn)
        if recomputing and not tap.edits:  # a callable index would do its work again, within the recomputation
            return output
        value = output
        if not tap.whole:
            value = pick(output, tap.recipe.index)
            if isinstance(value, Lack):
                if not recomputing:
                    self.lack(session, value)
                return output
            if self._edits(session, recomputing):
                value = self._edited(session, value)
                output = put(output, tap.recipe.index, value)
        if not recomputing:
            self.record(session, value)
        return output

    def lack(self, session: Session, lack: Lack) -> None:
        """The module ran, and did not give what the tap takes."""
        root = session.root()
        session.lacks.append(Entry(self.tap.number, self.fqn, lack, root, call=session.number_call(self.site, root)))
        if session.wanted is not None:
            session.arrived(self.tap.number, self.fqn)

    def record(self, session: Session, value: Any) -> None:
        # A model's own work drives this out of the caches between any two calls: few functions, few lookups.
        tap = self.tap
        if session.grad and not tap.recipe.detach and not torch.is_grad_enabled():
            session.notice_checkpoint(self.fqn, edits=False)
        root = session.root()
        call = session.number_call(self.site, root)
        if tap.every or tap.kept_last or call in tap.calls:  # type: ignore[operator]
            kept = value if tap.untouched else self._finished(session, value)
            version = version_of(kept)
            entry = Entry(tap.number, self.fqn, kept, root, version, call)
            session.entries.append(entry)
            if tap.kept_last:
                session.keep_last(self.site, entry, tap.kept_last, tap.calls or ())
        if session.wanted is not None:
            session.arrived(tap.number, self.fqn)

    def _finished(self, session: Session, value: Any) -> Any:
        recipe = self.tap.recipe
        if not isinstance(value, torch.Tensor) and (kind := beyond(value, recipe)) is not None:
            elements = reached(value, recipe) if recipe.index is None else ()
            problem = out_of_reach(self.tap.name, self.fqn, kind, elements)
            if problem not in session.problems:
                session.problems.append(problem)
        try:
            with unseen():
                return finish(value, recipe)
        except Exception as error:
            self._tell(error)
            raise

    def _edits(self, session: Session, recomputing: bool) -> bool:
        return edits(self.tap.recipe, _NO_CALL if recomputing else len(session.fired[self.site]))

    def _edited(self, session: Session, value: Any) -> Any:
        session.notice_checkpoint(self.fqn, edits=True)
        try:
            with session.editing(self.tap.number):
                return edit(value, self.tap.recipe, self.tap.name, self.fqn)
        except Exception as error:
            self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        """Whoever sees it far from the capture learns which tap it was."""
        if hasattr(error, "add_note") and not isinstance(error, Misfit):  # Python 3.11; that says it
            error.add_note(f"within the capture's tap {self.tap.name!r}, at module {self.fqn!r}")


class TakeWhole(TakeOutput):
    """The usual tap: every output as it is. `Session.settle_raw` does the rest later.

    Where a module has no other action, the hook itself does what `leave` does.
    """

    __slots__ = ()
    index = None

    def leave(self, session: Session, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if backward_id() != -1 and session.recomputing(self.fqn):
            return output
        if session.grad and not torch.is_grad_enabled():
            session.notice_checkpoint(self.fqn, edits=False)
        version = version_of(output)
        session.raw.append((self, output, version, session.root()))
        return output


class TakeInput(TakeOutput):
    """One tap at one module, before it runs."""

    __slots__ = ()
    wants_kwargs = True

    def enter(self, session: Session, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tap = self.tap
        if tap.edits and tap.number in resting(session):
            return None
        recomputing = backward_id() != -1 and session.recomputing(self.fqn)
        if recomputing and not tap.edits:
            return None
        index = tap.recipe.index
        by_place = type(index) is int and 0 <= index < len(args)  # then nobody asks for names
        place = argument_place(() if by_place else parameters_of(original(module)), index, args, kwargs)
        if isinstance(place, Lack):
            if not recomputing:
                self.lack(session, place)
            return None
        edited = None
        value = take_argument(place, args, kwargs)
        if self._edits(session, recomputing):
            value = self._edited(session, value)
            edited = put_argument(place, args, kwargs, value)
        if not recomputing:
            self.record(session, value)
        return edited


def argument_place(names: Sequence[str], index: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where an argument stands: its position or its key; a callable index sees all of them. Else a `Lack`.

    ``names``: see `parameters_of`.
    """
    if callable(index):
        return index
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
    count = f"{len(args)} positional argument" + ("" if len(args) == 1 else "s")
    return Lack(f"a call with {count}" + (f" and {', '.join(kwargs)}" if kwargs else ""))


def take_argument(place: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(place, int):
        return args[place]
    return kwargs[place] if isinstance(place, str) else take((args, kwargs), place)


def put_argument(place: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
    if isinstance(place, int):
        return put(args, place, value), kwargs
    return args, {**kwargs, place: value}


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward by their positions, that of the instance if it has its own.

    Where that only passes on what it is given, ``*args``, the names are those of the class.
    """
    if scripted(module):
        method: Any = module.forward
        return tuple(argument.name for argument in method.schema.arguments[1:])
    own = module.__dict__.get("forward")
    names = () if own is None else _positions(own)  # not kept: it may hold the module
    return names or _of_class(type(module).forward)


@functools.lru_cache(maxsize=512)
def _of_class(forward: Callable[..., Any]) -> tuple[str, ...]:
    return _positions(forward)[1:]


def _positions(forward: Callable[..., Any]) -> tuple[str, ...]:
    """What comes after ``*args`` has no position."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # nothing is known of it
        return ()
    named = itertools.takewhile(lambda parameter: parameter.kind is not parameter.VAR_POSITIONAL, parameters)
    return tuple(parameter.name for parameter in named if parameter.kind is not parameter.VAR_KEYWORD)
