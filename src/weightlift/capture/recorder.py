"""`recorder`: a model's forward that also returns what its modules took or gave, compiled or not."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from weightlift.capture.api import Capture
from weightlift.capture.checks import settle_recorded
from weightlift.capture.choice import Choice
from weightlift.capture.compiled import Regions
from weightlift.capture.gathering import Gather
from weightlift.capture.regions import InCompiledCode, region_of
from weightlift.capture.result import Entry, Recorded, Records
from weightlift.capture.select import Watch, compiled_wrapper, original, own_taps
from weightlift.capture.taps import Declared, Input, Output, Tap, collect_taps, require_module
from weightlift.capture.template import Template, choose, steady
from weightlift.capture.twin import Left, Sites, Take, Twin, build_twin, with_own_code
from weightlift.capture.values import recipe_of
from weightlift.errors import CaptureError, Problem
from weightlift.locks import Lock


class Refused(CaptureError, AssertionError):
    """A `CaptureError` of a call that is being traced: torch lets assertions through, and wraps most other errors."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What is refused while a call is being traced reaches the caller."""
    try:
        yield
    except CaptureError as error:
        raise Refused(error.summary, error.problems) from None


@dataclass(frozen=True, eq=False)
class Expected:
    """What records are compared with. They hold it, so it holds no module."""

    taps: tuple[tuple[int, str, Tap, tuple[str, ...]], ...]

    def settle(self, raw: Sequence[Recorded]) -> tuple[list[Entry], list[Problem]]:
        """Entries of what a call through a twin recorded, and what is wrong with them."""
        return settle_recorded(raw, self.taps)


@dataclass(frozen=True, eq=False)
class Setup:
    """What a recorder works with until the model's structure changes; replaced as a whole."""

    left: dict[tuple[int, str], int] | None  # with ``stop``: calls of each module until the forward is left
    expected: Expected
    eval_twin: Twin
    train_twin: Twin
    mixed_twin: Twin | None
    mixed_flags: tuple[bool, ...]
    regions: Regions | None
    remake: Callable[[], Twin]
    meant: frozenset[tuple[str, int]]  # what is wanted: names, and ids of what the twins hold
    watches: tuple[Watch, ...]  # of what was looked through to find that, copied or not

    def stands(self) -> bool:
        """Whether nothing changed where it was looked for. Not to be traced."""
        return all(watch.stands() for watch in self.watches)

    def pick(self) -> Twin | None:
        """The twin for the modes that the model is in now; None when it has to be built first."""
        if not self.train_twin.stands():
            return None
        flags = tuple([module.training for module in self.train_twin.originals])
        twin = self.mixed_twin if flags == self.mixed_flags else None
        if all(flags):
            twin = self.train_twin
        elif not any(flags):
            twin = self.eval_twin
        return twin

    def mixed(self) -> Setup:
        twin = self.remake()
        flags = tuple([module.training for module in self.train_twin.originals])
        return replace(self, mixed_twin=twin, mixed_flags=flags)


class Eager:
    """What runs where nothing is traced; ``call`` runs it.

    Where torch gives up on a trace (a model, an option or ``replace`` raised meanwhile), it runs the same code instead,
    then and later, and compiles what that calls, where no hook would see anything. So once something was traced,
    nothing of it is compiled but what is by itself.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.call = call

    def keep_apart(self) -> None:
        """Something is being traced."""
        self.call = torch.compiler.disable(self._call)  # type: ignore[no-untyped-call]


class Recording:
    """A recorder's model and taps, and what was built for them."""

    def __init__(self, model: nn.Module, taps: dict[str, Tap]) -> None:
        self.model = original(model)
        self.taps = taps
        self.names = tuple(taps)
        self.cell: Any = threading.local()
        self.lock = Lock()
        self.refreshed = "0"  # how often; as text, since torch lets compiled code go on where a number changed
        self.built = self.build()
        self.template: Template | None = None  # of the latest call outside compiled code

    def refresh(self) -> None:
        """Looks at the model again."""
        with self.lock.own:
            self.built = self.build()
            self.template = None
            self.refreshed = str(int(self.refreshed) + 1)

    def prepare(self) -> bool:
        """Builds anew if what there is does not fit the model as it is now."""
        with self.lock.own:
            built = self.look_again()
            if built.pick() is None:
                # Only another mixture of modes: the other twins, and what was compiled for them, stay good.
                self.built = built.mixed() if built.train_twin.stands() else self.build()
        return True

    def look_again(self) -> Setup:
        """What there is, if the same is still wanted; else built anew. Under the lock."""
        if not self.built.stands():
            watches: list[Watch] = []
            meant = _meant(choose(self.model, list(self.taps.items()), watches))
            same = meant == self.built.meant
            self.built = replace(self.built, watches=tuple(watches)) if same else self.build()
        return self.built

    def build(self) -> Setup:
        watches: list[Watch] = []
        choice = choose(self.model, list(self.taps.items()), watches)
        counts = choice.awaited()
        sites = _sites(choice)
        regions = any(region_of(self.model, fqn) is not None for fqn in choice.fqns()) or any(
            compiled_wrapper(item.module) for items in choice.modules.values() for item in items
        )
        # A twin for each mode, so that switching between them compiles nothing that was compiled before.
        remake = functools.partial(build_twin, self.model, sites, self.cell, None)
        train_twin = build_twin(self.model, sites, self.cell, True)  # first: while it stands, all do
        flags = tuple([module.training for module in train_twin.originals])
        return Setup(
            counts,
            _expected(choice),
            build_twin(self.model, sites, self.cell, False),
            train_twin,
            None if all(flags) or not any(flags) else remake(),
            flags,
            Regions(self.model, sites, self.cell) if regions else None,
            remake,
            _meant(choice),
            tuple(watches),
        )


def _expected(choice: Choice) -> Expected:
    taps = []
    for number, (name, tap) in enumerate(choice.taps):
        fqns = tuple(item.fqn for item in choice.modules.get(number, ()))
        taps.append((number, name, replace(tap, select="") if isinstance(tap, Output) else tap, fqns))
    return Expected(tuple(taps))


def _meant(choice: Choice) -> frozenset[tuple[str, int]]:
    modules = {} if choice.declared is None else choice.declared.modules
    named = [(item.fqn, id(item.module)) for items in choice.modules.values() for item in items]
    return frozenset((*named, *((fqn, id(module)) for fqn, module in modules.items())))


def _sites(choice: Choice) -> dict[int, Sites]:
    sites: dict[int, Sites] = {}

    def at(module: nn.Module) -> Sites:
        return sites.setdefault(id(original(module)), Sites([]))

    for number, (name, tap) in enumerate(choice.taps):
        for item in choice.modules.get(number, ()):
            at(item.module).takes.append(Take(number, name, item.fqn, recipe_of(tap), isinstance(tap, Input)))
    if (wanted := choice.declared) is not None:
        declared = choice.declaring()
        for scope, pairs in wanted.scopes:
            at(wanted.modules[scope.fqn]).gather = Gather(scope, pairs, declared)
        for site in wanted.sites:
            place = at(wanted.modules[site.fqn])
            place.declared = [*(place.declared or ()), site]
    return sites


class Recorder(Protocol):
    """The function that `recorder` gives."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Records]:
        """The model's output, and what was recorded."""

    def refresh(self) -> None:
        """Looks at the model's hooks and plain attributes again, which the copied modules had from when it was made."""


def recorder(model: nn.Module, /, *declared: str | Declared, **taps: Any) -> Recorder:
    """A function that calls ``model`` and returns ``(output, records)``.

    Args:
        model, declared, taps: as for `capture`. Made from what ``torch.compile`` returned, the model inside is taken:
            compile the recorder, or use it on a model whose layers were compiled one by one.

    Returns:
        A function for any number of threads. ``torch.compile(record)`` compiles model and capture into one graph, with
        no break and no state outside the call. The model itself carries no hook. `Records` raises `CaptureError` when
        it is read, if a wanted module did not run. With ``stop`` the output is None.

    Raises:
        TypeError, ValueError: as `capture`.
        CaptureError: something that is wanted does not exist.

    The function follows changes of parameters, buffers, modes and sub-modules; hooks and other attributes that are set
    later on modules it had to copy (those on the way to what is wanted) are seen after ``record.refresh()``.
    """
    require_module(model)
    state = Recording(model, collect_taps(declared, taps, own_taps(model)))
    eager = Eager(run_eagerly)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def prepare(refreshed: str) -> bool:
        """Runs while a call is being traced, not when the compiled code runs: what was built fits from then on.

        ``refreshed``: torch compiles anew when it changes, as it does not when modules have other hooks.
        """
        eager.keep_apart()
        with refusals():
            return state.prepare()

    def record(*args: Any, **kwargs: Any) -> tuple[Any, Records]:
        if not is_dynamo_compiling():
            return eager.call(state, args, kwargs)  # type: ignore[no-any-return]
        prepare(state.refreshed)
        built = state.built
        output, entries = run(state, built, built.pick(), None, args, kwargs)
        return output, Records(state.names, entries, built.expected)

    own = with_own_code(record, f"record_{type(state.model).__name__}")
    own.__doc__ = f"Calls {type(state.model).__name__} and returns (output, records)."
    own.refresh = state.refresh  # type: ignore[attr-defined]
    return cast("Recorder", own)


def run(
    state: Recording, built: Setup, twin: Twin | None, forward: Callable[..., Any] | None, args: Any, kwargs: Any
) -> tuple[Any, list[Any]]:
    """One call through a twin. Everything it records is made, filled and returned here."""
    assert twin is not None, "the model changed while it ran"
    cell = state.cell
    entries: list[Any] = []
    cell.entries = entries
    cell.scopes = []
    cell.left = None if built.left is None else dict(built.left)
    output = None
    try:
        output = twin.root(*args, **kwargs) if forward is None else forward(twin.root, *args, **kwargs)
    except Left:
        pass
    finally:
        cell.entries = None
        cell.scopes = None
    return output, entries


def run_eagerly(state: Recording, args: Any, kwargs: Any) -> tuple[Any, Records]:
    built = state.built
    if built.regions is not None and not built.stands():
        with state.lock.own:
            built = state.look_again()
    if built.regions is not None:
        twin = built.regions.twin()
        if twin is None:
            state.refresh()
            return run_eagerly(state, args, kwargs)
        output, entries = run(state, built, twin, None, args, kwargs)
        return output, Records(state.names, entries, built.expected)
    output = got = None
    opened = Capture(state.model, state.taps, state.template)
    try:
        with opened as got:
            state.template = opened.template if all(map(steady, state.taps.values())) else None
            output = state.model(*args, **kwargs)
    except InCompiledCode:
        if got is not None:  # of a capture that the model itself makes
            raise
    if got is None:  # parts were compiled since this was built
        state.refresh()
        return run_eagerly(state, args, kwargs)
    return output, got
