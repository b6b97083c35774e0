"""Which forwards run in a context, for which captures, and whose edits."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any, Protocol, TypeAlias

from torch import is_grad_enabled, is_inference_mode_enabled, nn

from weightlift.capture.result import Entry

_NOTHING: dict[int, Any] = {}
_NO_TAPS: frozenset[int] = frozenset()
Due: TypeAlias = "tuple[nn.Module | None, Any, Any]"
NONE_DUE: Due = (None, None, None)
_NONE_LEFT: Iterator[Due] = iter(())
NOWHERE: deque[Any] = deque(maxlen=0)
"""Keeps nothing of what is appended."""


class Captures(Protocol):
    """A session, as far as forwards look at it."""

    held: Sequence[nn.Module]
    grad: bool
    raw: list[tuple[Any, Any, int, int | None]]
    numbers: Iterator[int]
    frames: dict[Forward, FrameType]

    def drop(self, forward: Forward) -> None:
        """As if it had not been: it failed."""

    def stop_with(self, forward: Forward) -> None:
        """Another session has stopped it."""


class Edit:
    """A call of a tap's ``replace``. ``over``: a context that was copied meanwhile still knows it afterwards."""

    __slots__ = ("number", "over", "session")

    def __init__(self, session: Captures, number: int) -> None:
        self.session = session
        self.number = number
        self.over = False


class Forward:
    """A forward of the captured model, or of a sub-model that gathers declared outputs, while it runs.

    ``is_root``: of the captured model, which may gather, too. ``number`` tells its forwards apart, and ``root`` is that
    of the one it belongs to, if any. What came is known by it, so that nothing that is kept refers back to a forward.
    ``simple``: the modules, by their ids, whose output needs nothing but to be appended to ``raw`` as it is.
    ``due``: that of them which is likely to run next, what is done there, and what is done with its first argument
    before; ``rest``: those after it. ``asks_all``: another capture has to be asked, too, so nothing of that counts.
    ``resting``: the numbers of the taps whose edit runs it.
    """

    __slots__ = (
        "around", "asks_all", "attached", "done", "due", "gathered", "grad", "is_root", "number", "outer", "owner",
        "raw", "rest", "resting", "root", "session", "simple", "stopped", "thread",
    )  # fmt: skip

    def __init__(
        self, session: Captures, owner: Any, outer: Forward | None, thread: int, is_root: bool, asks_all: bool
    ) -> None:
        self.session = session
        self.owner = owner
        self.outer = outer
        self.thread = thread
        self.is_root = is_root
        self.asks_all = asks_all
        self.done = False
        self.stopped = False  # nobody wanted the rest of it
        self.around = False  # another forward of the same model runs within it
        self.resting = resting(session)
        self.grad = is_grad_enabled()
        if self.grad:  # it may have been off when the capture was entered
            session.grad = True
        self.attached: bool = session.grad and owner.attached
        self.simple: dict[int, Any] = _NOTHING
        self.due: Due = NONE_DUE
        self.rest: Iterator[Due] = _NONE_LEFT
        held = session.held  # nothing if it is being closed by another thread
        if held and not self.asks_all:
            self.simple = owner.simple
            if owner.likely is not None and not is_inference_mode_enabled():
                # Made now: threads that share a zip could get a module with what is done at another.
                self.rest = iter([*zip(owner.likely(held), owner.expected, owner.expected_first)])
                self.due = next(self.rest)
        self.raw: Any
        self.gathered: dict[str, list[Entry]] | None
        if owner.gathers:
            self.gathered, self.raw = {}, []
        else:
            self.gathered, self.raw = None, session.raw
        root = None if is_root else running_root(session, outer)
        self.number: int = next(session.numbers) if root is None else root.number
        self.root = self.number if is_root or root is not None else None

    def frame(self) -> FrameType | None:
        """That of torch which calls the model and its hooks, as long as it runs."""
        return self.session.frames.get(self)

    def ask_all(self) -> None:
        """From now on every hook asks all open captures, and nothing is noted before."""
        self.asks_all = True

    def passed(self, module: nn.Module) -> None:
        """A module that may have been due was seen to elsewhere."""
        if self.due[0] is module:
            self.due = next(self.rest, NONE_DUE)

    def has_begun(self) -> None:
        """The first of its values has come: with the others there is less to be done, if nobody else is to be asked."""
        self.simple = self.owner.simple_later

    def forget(self) -> None:
        """It keeps nothing from now on, whatever a context that was copied while it ran still brings."""
        self.ask_all()
        self.due = NONE_DUE
        self.rest = _NONE_LEFT
        self.raw = NOWHERE
        if self.gathered is not None:
            self.gathered = {}


running: ContextVar[Forward | None] = ContextVar("weightlift_forwards", default=None)
edits: ContextVar[tuple[Edit, ...]] = ContextVar("weightlift_edits", default=())


def resting(session: Captures) -> frozenset[int]:
    """The numbers of the taps whose ``replace`` runs just now: what that calls runs without them."""
    known = edits.get()
    return frozenset([one.number for one in known if one.session is session and not one.over]) if known else _NO_TAPS


def is_on_stack(wanted: FrameType | None) -> bool:
    """Whether a frame is on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False


def running_root(session: Captures, forward: Forward | None) -> Forward | None:
    while forward is not None:
        if forward.session is session and forward.is_root:
            return forward
        forward = forward.outer
    return None


def nearest() -> Forward | None:
    """The innermost forward that runs. Those within it that failed are dropped, whichever capture they belong to.

    Those that have ended stand there in a context that was copied while they ran.
    """
    thread = threading.get_ident()
    forward = running.get()
    while forward is not None and forward.thread == thread and not is_on_stack(forward.session.frames.get(forward)):
        if not forward.done and not forward.stopped:
            forward.session.drop(forward)
        forward = forward.outer
    return forward


def without(session: Captures, forward: Forward | None) -> Forward | None:
    """The chain of running forwards without those of a session at its top."""
    while forward is not None and forward.session is session:
        forward = forward.outer
    return forward
