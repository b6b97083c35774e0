"""One open capture: what to do at which module, and what was seen."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, Protocol, TypeAlias

import torch
from torch import is_grad_enabled, nn

from weightlift.capture.checkpointing import checkpointed_region
from weightlift.capture.forwards import NOWHERE, Edit, Forward, edits, is_on_stack, nearest, running, running_root
from weightlift.capture.result import Entry
from weightlift.errors import Problem
from weightlift.locks import Lock

# Re-entrant: what the collector runs meanwhile may capture, too.
_lock = Lock(reentrant=True)
backward_id = torch._C._current_graph_task_id  # -1 outside a backward pass
Mark: TypeAlias = "tuple[int, CodeType]"  # a frame, which is not held


class Work(Protocol):
    """What was worked out for a model and a choice of taps, as far as sessions and hooks look at it: what is done at
    which module (by ids), and at which places of a session's modules hooks are to stand."""

    before: dict[int, list[Any]]
    after: dict[int, list[Any]]
    with_kwargs: frozenset[int]
    sites: dict[tuple[int, str], int]
    awaited: dict[tuple[int, str], int] | None
    hooked_before: tuple[int, ...]
    hooked_after: tuple[int, ...]
    hooked_with_kwargs: tuple[int, ...]
    models: frozenset[int]
    hooked_models: tuple[int, ...]

    def modules(self) -> list[nn.Module]:
        """Those that it knows by their ids, as far as they live."""


class Stopped(BaseException):
    """Leaves a forward whose rest nobody wants. Not an Exception, so that no model's own ``except`` keeps it."""

    def __init__(self, session: Session) -> None:
        self.session = session


open_sessions: ContextVar[tuple[Session, ...]] = ContextVar("weightlift_captures", default=())


def _take_out(items: list[Any], unwanted: Callable[[Any], bool]) -> None:
    """What other threads append meanwhile stays. Those that take something out hold the lock."""
    count = len(items)
    items[:count] = [item for item in items[:count] if not unwanted(item)]


class Session:
    """What the hooks look up. Everything but ``entries`` and the sets of what was noticed is fixed once it is open."""

    __slots__ = (
        "after", "around", "backward", "before", "checkpointed", "children", "closed", "count", "detached", "elsewhere",
        "ended", "entered", "entries", "fired", "forgotten", "forwards", "frames", "gave", "grad", "held", "installed",
        "lacks", "last", "numbers", "problems", "raw", "recomputed", "stopped", "strayed", "template", "wanted",
    )  # fmt: skip

    def __init__(
        self,
        template: Work,
        held: Sequence[nn.Module],  # the template says which is which
        children: Sequence[Any] = (),  # the dictionaries of all children that were looked at
    ) -> None:
        self.closed = False
        self.forgotten = False
        self.installed = False  # its template is among the open ones
        self.template = template
        self.before: dict[int, list[Any]] = template.before
        self.after: dict[int, list[Any]] = template.after
        self.held = held
        self.children = children
        self.count = sum(map(len, children))
        self.numbers: Iterator[int] = itertools.count()
        # What came since, not yet among the entries: what took it, the value, its version, the number of its forward.
        self.raw: list[tuple[Any, Any, int, int | None]] = []
        self.entries: list[Entry] = []
        # For each site the numbers of the forwards that its calls were in.
        self.fired: list[list[int | None]] = [[] for _ in template.sites]
        self.last: dict[int, deque[Entry]] = {}
        self.forwards: list[Forward] = []
        # Which call each running forward is: to tell one that runs from one that failed. Not held by the forward, which
        # a copied context may hold for long.
        self.frames: dict[Forward, FrameType] = {}
        # By the ids of the frames around those, which still run: forwards that have ended, until all hooks have run.
        self.ended: dict[int, Forward] = {}
        # What is still to come before the forward is left, and the forward that runs around the whole capture.
        self.wanted: dict[tuple[int, str], int] | None = None
        self.around: Forward | None
        if template.awaited is not None:
            self.wanted, self.around = dict(template.awaited), running.get()
        self.gave: dict[int, set[str]] = {}  # by forwards' numbers the modules that gave something declared
        # What is rare gets no sets of its own until it happens.
        self.recomputed: frozenset[str] = frozenset()
        self.elsewhere: frozenset[int] = frozenset()  # ids of modules that ran where nobody captures
        self.detached: frozenset[str] = frozenset()
        self.checkpointed: frozenset[str] = frozenset()
        self.problems: list[Problem] = []
        self.lacks: list[Entry] = []  # calls that did not give what a tap takes: the value is a `Lack`
        self.stopped = False
        self.grad = is_grad_enabled()
        self.backward: int = backward_id()  # the backward pass around the block
        # The generators that ran when the block was entered, the one with the block first, and those that ran the model
        # where it went unseen.
        self.entered: tuple[Mark | None, ...] = ()
        self.strayed: frozenset[Mark] = frozenset()

    def forget(self) -> None:
        """A context that was copied meanwhile still knows the session: from now on it holds no tensor and no module."""
        self.forgotten = True
        for forward in (*self.forwards, *self.frames):
            if forward.raw is not NOWHERE:
                forward.forget()
        self.raw.clear()
        self.entries = []
        self.forwards = []
        self.frames = {}
        self.ended = {}
        self.last = {}
        self.before = self.after = {}
        self.held = self.children = ()

    def begin(self, owner: Any, frame: FrameType, *, is_root: bool) -> None:
        """A forward of ``owner`` starts. What an earlier one left behind, because it failed, is dropped.

        ``frame``: that of torch which calls the module and its hooks.
        """
        outer = nearest()
        around = running_root(self, outer) if is_root else None
        if around is not None and not around.done:
            around.around = True
        forward = Forward(self, owner, outer, threading.get_ident(), is_root, len(open_sessions.get()) != 1)
        self.frames[forward] = frame
        self.ended.pop(id(frame.f_back), None)  # of a call that is over
        if is_root:
            self.forwards.append(forward)
        running.set(forward)

    def end(self, owner: object) -> Forward | None:
        """A forward of ``owner`` ends. Those of other captures of the same model may stand above it in the chain."""
        forward, above = running.get(), None
        while forward is not None and not (forward.session is self and forward.owner is owner):
            above = forward
            forward = forward.outer
        if forward is None or forward.done:
            return None
        forward.done = True
        forward.ask_all()
        frame = self.frames.pop(forward, None)
        if frame is not None and forward.is_root:
            self.ended[id(frame.f_back)] = forward
        if above is None:
            running.set(forward.outer)
        else:
            above.outer = forward.outer
        return forward

    def drop(self, forward: Forward) -> None:
        """As if it had not been: it failed."""
        forward.forget()
        self.frames.pop(forward, None)
        if not forward.is_root:
            return
        number = forward.number
        with _lock.own:
            self.settle_raw()
            self._renumber(number)
            _take_out(self.entries, lambda entry: entry.forward == number)
            _take_out(self.lacks, lambda entry: entry.forward == number)
            _take_out(self.forwards, lambda other: other is forward)
            for calls in self.fired:
                _take_out(calls, lambda call: call == number)
            for site, last in self.last.items():
                self.last[site] = deque(entry for entry in last if entry.forward != number)
            self.gave.pop(number, None)
            if self.template.awaited is not None:
                left = {key: n - len(self.fired[self.template.sites[key]]) for key, n in self.template.awaited.items()}
                self.wanted = {key: n for key, n in left.items() if n > 0}

    def _renumber(self, number: int) -> None:
        """The calls of a forward that failed are not counted: those of others that came after them move up."""
        for entry in (*self.entries, *self.lacks):
            site = self.template.sites.get((entry.tap, entry.fqn))
            if site is not None:
                entry.call -= self.fired[site][: entry.call].count(number)

    def number_call(self, site: int, root: int | None) -> int:
        """How many calls a site has seen before this one, which is in the forward ``root``."""
        with _lock.own:
            fired = self.fired[site]
            fired.append(root)
            return len(fired) - 1

    def keep_last(self, site: int, entry: Entry, count: int, wanted: Collection[int]) -> None:
        """Of the calls of a site only the last ``count`` are kept, and those that are ``wanted``."""
        with _lock.own:
            last = self.last.setdefault(site, deque())
            last.append(entry)
            if len(last) > count:
                old = last.popleft()
                if old.call not in wanted:
                    self.entries.remove(old)

    def stop_with(self, forward: Forward) -> None:
        """Another capture has stopped this forward, if it does not run any more: that is no failure."""
        here = forward.thread == threading.get_ident()  # another thread's stack is not to be seen
        if here and not forward.done and not is_on_stack(self.frames.get(forward)):
            self.stopped = forward.stopped = True

    def gives(self, fqn: str, number: int) -> None:
        """Notes that a module gave something declared."""
        self.gave.setdefault(number, set()).add(fqn)

    def settle_raw(self) -> None:
        """Makes entries of what came since, in its order."""
        if not self.raw:
            return
        with _lock.own:
            if self.forgotten:  # it came in the moment of closing
                self.raw.clear()
            came = self.raw[:]
            del self.raw[: len(came)]  # no more than that: other threads may go on
            for action, value, version, number in came:
                fired = self.fired[action.site]
                self.entries.append(Entry(action.tap.number, action.fqn, value, number, version, len(fired)))
                fired.append(number)

    def gathering(self) -> Forward | None:
        """The nearest running sub-model that gathers declared outputs."""
        forward = running.get()
        while forward is not None:
            if forward.session is self and forward.gathered is not None and not forward.done:
                return forward
            forward = forward.outer
        return None

    def root(self) -> int | None:
        """The number of the forward that runs."""
        forward = running.get()
        if forward is None or forward.session is not self or not forward.is_root:
            forward = running_root(self, forward)
        return None if forward is None else forward.number

    @contextmanager
    def editing(self, number: int) -> Iterator[None]:
        """While a tap's ``replace`` runs: it may call the module that it edits, or a model around that."""
        edit = Edit(self, number)
        token = edits.set((*edits.get(), edit))
        try:
            yield
        finally:
            edit.over = True
            edits.reset(token)

    def arrived(self, tap: int, fqn: str) -> None:
        """Counts a call, and leaves the forward when it was the last that anybody waits for."""
        assert self.wanted is not None
        left = self.wanted.get((tap, fqn), 0) - 1
        if left > 0:
            self.wanted[tap, fqn] = left
        elif left == 0:
            self.wanted.pop((tap, fqn), None)  # another thread of this context may have come first
        if not self.wanted:
            self.stopped = True
            forward = running.get()
            while forward is not None and forward is not self.around:  # those of other captures end with it
                forward.stopped = True
                forward = forward.outer
            raise Stopped(self)

    def in_backward(self) -> bool:
        """Whether a backward pass runs that began within the block. In one around it, as where a checkpointed region
        has the block, what runs there is all that there is to record."""
        return backward_id() not in (-1, self.backward)

    def recomputing(self, fqn: str) -> bool:
        """Whether this call repeats one of an earlier forward for a backward pass; noted for the messages."""
        if not self.in_backward():
            return False
        with _lock.own:
            self.recomputed |= {fqn}
        return True

    def notice_checkpoint(self, fqn: str, *, edits: bool) -> None:
        """Reentrant checkpointing runs without autograd: what is captured there is cut off. Edits are not repeated."""
        if not self.grad or (not edits and is_grad_enabled()):
            return
        region, sure = checkpointed_region(nearest())
        with _lock.own:
            if edits and region is not None:
                self.checkpointed |= {fqn}
            elif region == "reentrant" and (sure or self._learns()):
                self.detached |= {fqn}

    def _learns(self) -> bool:
        """Whether a gradient may be wanted of any parameter."""
        models = [module for module in self.held if id(module) in self.template.models]
        return any(parameter.requires_grad for model in models for parameter in model.parameters())
