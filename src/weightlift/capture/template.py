"""What a capture does at which module, worked out once for each model and choice of taps."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from weightlift.capture.actions import Action, Root, TakeInput, TakeOutput, TakeWhole, Tapping
from weightlift.capture.choice import Choice
from weightlift.capture.declared import Resolved, enclosing, resolve
from weightlift.capture.gathering import Gather, GiveDeclared
from weightlift.capture.regions import InCompiledCode, inside_compiled, inside_scripts
from weightlift.capture.select import Selected, Watch, merged, path_to, select
from weightlift.capture.session import Session
from weightlift.capture.taps import Declared, Input, Options, Output, Tap, no_option
from weightlift.capture.values import holds_tensors
from weightlift.errors import CaptureError, Problem

_NOT_LIKE_THIS = "{} can't be captured like this"


class Template:
    """Actions by the ids of modules, which it holds weakly. Immutable, so any number of sessions can share it.

    Raises `CaptureError` when it is made, with everything that does not exist or can't be seen.
    """

    def __init__(self, model: nn.Module, taps: dict[str, Tap]) -> None:
        self.taps = tuple(taps.items())
        self.names = tuple(taps)
        self.watches: list[Watch] = []
        choice = choose(model, self.taps, self.watches)
        problems = inside_compiled(model, choice)
        if problems:
            raise InCompiledCode(_NOT_LIKE_THIS.format(type(model).__name__), problems)
        self.awaited = choice.awaited()
        self.sites: dict[tuple[int, str], int] = {}
        self.before: dict[int, list[Action]] = {}
        self.after: dict[int, list[Action]] = {}
        self._modules: dict[int, nn.Module] = {}
        self._fill(model, choice)
        self.with_kwargs = frozenset(
            key
            for actions in (self.before, self.after)
            for key, acts in actions.items()
            if any(action.wants_kwargs for action in acts)
        )
        self.chosen = _by_ids(choice.modules)
        self.givers = _by_ids(choice.givers())
        scopes = () if choice.declared is None else choice.declared.scopes
        self.scopes = {number: (scope.fqn, key) for scope, pairs in scopes for key, number in pairs}
        # What has to be looked at when a capture closes: modules that must give, and whether calls are counted, or taps
        # ask for classes, which may change without any module that comes or goes.
        self.giving = frozenset(name for givers in self.givers.values() for name, _ in givers)
        self.counting = any(isinstance(tap, Output) and tap.calls is not None for tap in taps.values())
        self.closely = self.counting or any(watch.classes for watch in self.watches)
        # With those on the way to them, which may have become compiled code that a capture would miss.
        ways = {id(item.module): item.module for fqn in choice.fqns() for item in path_to(model, fqn)}
        every = {**{key: self._modules[key] for key in self.after}, **self._modules, **ways}
        self.places = {key: place for place, key in enumerate(every)}
        # Which of the modules that a session holds get hooks.
        self.hooked_before = tuple(self.places[key] for key in self.before)
        self.hooked_after = tuple(self.places[key] for key in self.after)
        self.hooked_models = tuple(self.places[key] for key in self.models)
        self.hooked_with_kwargs = tuple(self.places[key] for key in self.with_kwargs)
        self._references = tuple(map(weakref.ref, every.values()))
        self._ways = tuple(self.places[key] for key in ways)
        self._modules.clear()
        self._simplify()

    def _fill(self, model: nn.Module, choice: Choice) -> None:
        gathers = self._gathers(choice)
        root = Root(next((gather for gather, module in gathers if module is model), None))
        self._enters(model, root)
        for gather, module in gathers:
            if module is not model:
                self._enters(module, gather)
        self.models = frozenset(id(module) for module in (model, *(module for _, module in gathers)))
        for number, (name, tap) in enumerate(self.taps):
            if isinstance(tap, Output):
                shared = Tapping(number, name, tap)
                take = TakeWhole if shared.plain and self.awaited is None else TakeOutput
                for item in choice.modules[number]:
                    site = self.sites.setdefault((number, item.fqn), len(self.sites))
                    if isinstance(tap, Input):
                        self._enters(item.module, TakeInput(shared, item.fqn, site))
                    else:
                        self._leaves(item.module, take(shared, item.fqn, site))
        if choice.declared is not None:  # what a layer gives is what it gives once it is edited
            self._give(choice.declared, [gather for gather, _ in gathers])
        for gather, module in gathers:
            self._leaves(module, gather)
        self._leaves(model, root)
        self._owners: tuple[Root | Gather, ...] = root, *(gather for gather, _ in gathers)

    def _simplify(self) -> None:
        sole = {key: actions[0] for key, actions in self.after.items() if len(actions) == 1}
        for owner in self._owners:
            owner.simplify(sole, self.places)

    def _gathers(self, choice: Choice) -> list[tuple[Gather, nn.Module]]:
        wanted = choice.declared
        if wanted is None:
            return []
        declared = choice.declaring()
        gathers = []
        for scope, pairs in wanted.scopes:
            sites = [self.sites.setdefault((number, scope.fqn), len(self.sites)) for _, number in pairs]
            gathers.append((Gather(scope, pairs, declared, sites), wanted.modules[scope.fqn]))
        return gathers

    def _give(self, wanted: Resolved, gathers: Sequence[Gather]) -> None:
        # Only the first of a (sub-)model's sites may have to give its first argument.
        scopes = {gather.scope.fqn: gather for gather in gathers}
        begun: set[str] = set()
        for site in wanted.sites:
            around = enclosing(site.fqn, scopes)
            action = GiveDeclared(site, site.initial and around not in begun)
            self._leaves(wanted.modules[site.fqn], action)
            scopes[around].own[id(wanted.modules[site.fqn])] = action
            if site.initial:
                begun.add(around)
        order = {id(module): place for place, module in enumerate(wanted.modules.values())}
        for gather in gathers:
            gather.own = dict(sorted(gather.own.items(), key=lambda item: order[item[0]]))

    def _enters(self, module: nn.Module, action: Action) -> None:
        self.before.setdefault(id(module), []).append(action)
        self._modules[id(module)] = module

    def _leaves(self, module: nn.Module, action: Action) -> None:
        self.after.setdefault(id(module), []).append(action)
        self._modules[id(module)] = module

    def modules(self) -> list[nn.Module]:
        """Those that it knows by their ids, as far as they live."""
        return [module for reference in self._references if (module := reference()) is not None]

    def stands(self) -> bool:
        """Whether the model is what it was when this was made, as far as it was looked through."""
        return all(watch.stands() for watch in self.watches)

    def open(self) -> Session | None:
        """A session, or None if the model is no longer what it was when this was made."""
        if not self.stands():
            return None
        held: list[nn.Module] = []
        for reference in self._references:
            module = reference()
            if module is None:
                return None
            held.append(module)
        for place in self._ways:
            if held[place]._compiled_call_impl is not None:
                return None
        try:
            children = [names for watch in self.watches for names in watch.children()]
        except AttributeError:  # one died just now
            return None
        return Session(self, held, children)


def _by_ids(modules: Mapping[int, list[Selected]]) -> dict[int, tuple[tuple[str, int], ...]]:
    """By the numbers of taps, names and ids of their modules."""
    return {number: tuple((item.fqn, id(item.module)) for item in items) for number, items in modules.items()}


def choose(model: nn.Module, taps: Sequence[tuple[str, Tap]], watches: list[Watch]) -> Choice:
    """What every tap means in a model. Raises `CaptureError` with every problem."""
    problems: list[Problem] = []
    looked: list[Watch] = []
    chosen: dict[int, list[Selected]] = {}
    declared: list[tuple[int, Declared]] = []
    wanted = None
    for number, (name, tap) in enumerate(taps):
        if isinstance(tap, Declared):
            declared.append((number, tap))
            continue
        try:
            chosen[number] = select(model, tap.select, looked)
        except CaptureError as error:
            problems.extend(no_option(name, problem) for problem in error.problems)
    if declared:
        try:
            wanted = resolve(model, declared, looked)
        except CaptureError as error:
            problems.extend(error.problems)
    if problems:
        raise CaptureError(f"nothing to capture in {type(model).__name__}", problems)
    choice = Choice(tuple(taps), chosen, wanted)
    if problems := inside_scripts(model, choice):
        raise CaptureError(_NOT_LIKE_THIS.format(type(model).__name__), problems)
    watches += merged(looked)
    return choice


def lasting(tap: Any) -> bool:
    """Whether a template may outlive the capture: nothing in it is the caller's own object."""
    if isinstance(tap, str):
        return True
    if isinstance(tap, type):
        return issubclass(tap, nn.Module)
    if not isinstance(tap, Options) or holds_tensors((tap.tokens, tap.at)):  # a mask
        return False
    if isinstance(tap, Output):
        return isinstance(tap.select, str | type) and not callable(tap.index) and tap.replace is None
    return isinstance(tap, Declared)


def steady(tap: Tap) -> bool:
    """Whether a tap means the same as long as the model's modules are the same: a predicate may look at anything, and
    a list may change."""
    return isinstance(tap, Declared) or isinstance(tap.select, str | type | nn.Module)
