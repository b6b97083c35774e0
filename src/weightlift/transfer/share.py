"""What one of several loads that run at once for one call may use of the threads and the memory of all."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from weightlift.errors import LoadCancelled
from weightlift.options import DEFAULT_BUDGET_BYTES, default_workers

_LEAST_BYTES = 1 << 20


class Turn:
    """Held by the one load whose Python code runs: constructors, planning, assignment.

    Two constructors that run at once take the interpreter from each other, and both from the threads that move bytes,
    so all would be ready late. One after the other, the first load's bytes move while the second constructs. Where
    there is no interpreter lock it holds nobody up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._alone = getattr(sys, "_is_gil_enabled", lambda: True)()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Wait for the turn, and hold it."""
        if not self._alone:
            yield
            return
        self._take()
        try:
            yield
        finally:
            self._give()

    @contextlib.contextmanager
    def given_away(self) -> Iterator[None]:
        """Let another load have the turn; in a thread that does not hold it nothing happens."""
        if self._holder != threading.get_ident():
            yield
            return
        self._give()
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def _give(self) -> None:
        self._holder = None
        self._lock.release()


@dataclass(frozen=True, slots=True)
class Share:
    """``workers`` threads, ``memory_budget_bytes`` in flight, the event that stops all of the loads, and their turn."""

    workers: int
    memory_budget_bytes: int
    cancel: threading.Event
    turn: Turn


def shares(sizes_bytes: Sequence[int], cancel: threading.Event) -> list[Share]:
    """One share for each of the loads, by the bytes that it has to read: together they stay within one load's."""
    whole = max(1, sum(sizes_bytes))
    workers, turn = default_workers(), Turn()
    return [
        Share(
            max(1, round(workers * size / whole)),
            max(_LEAST_BYTES, DEFAULT_BUDGET_BYTES * size // whole),
            cancel,
            turn,
        )
        for size in sizes_bytes
    ]


_mine: ContextVar[Share | None] = ContextVar("weightlift.share", default=None)


@contextlib.contextmanager
def within(share: Share) -> Iterator[None]:
    """Loads of this context take no more than ``share``, and prepare one at a time.

    Waits for the turn. Raises LoadCancelled when the loads are to stop by then.
    """
    token = _mine.set(share)
    try:
        with share.turn.holding():
            if share.cancel.is_set():
                raise LoadCancelled
            yield
    finally:
        _mine.reset(token)


@contextlib.contextmanager
def moving_bytes() -> Iterator[None]:
    """While this load's bytes are moved, by threads that seldom need the interpreter, another may prepare."""
    share = _mine.get()
    with contextlib.nullcontext() if share is None else share.turn.given_away():
        yield


def of_this_load() -> dict[str, Any]:
    """Options for `weightlift.options.LoadOptions` by this context's share: none where there is no such share."""
    share = _mine.get()
    if share is None:
        return {}
    return {
        "workers": share.workers,
        "memory_budget_bytes": share.memory_budget_bytes,
        "cancel": share.cancel,
        "progress": False,
    }
