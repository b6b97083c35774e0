"""One lock for loads that keep their state to themselves and for those of others that patch the process.

A native load is a reader: any number run at once. A load through somebody else's code, which replaces functions for its
duration, is the writer: it runs alone. Waiting is first come, first served, so neither kind starves; but where no
reader ends for a while, one may be waiting for the very thread that queues behind a writer, and that is let in.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_log = logging.getLogger("weightlift")

T = TypeVar("T")

PATIENCE_SECONDS = 5.0
_WORTH_TELLING_SECONDS = 60.0


class NotNative(Exception):
    """A load that is left to the library it is for."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what = what
        self.why = why


class HelperThread(Exception):
    """A helper thread of a load came to something that has to run alone: the thread that it helps has to do that."""


class FairLock:
    """A readers–writer lock, fair and re-entrant; a thread that reads may step out of reading in order to write.

    A writer may read and write again within; to a thread that only reads, reading again costs nothing and never waits.
    A reader overtakes the writers before it when others read and none of them has ended for ``patience_seconds``.
    """

    def __init__(self, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._patience_seconds = patience_seconds
        self._ended = 0  # readers, so far
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()
        self._readers: dict[int, int] = {}
        self._helpers: set[int] = set()
        self._writer: int | None = None
        self._depth = 0

    @property
    def writing(self) -> bool:
        """True in the thread that holds the lock alone."""
        return self._writer == threading.get_ident()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it with other readers."""
        me = threading.get_ident()
        if self.writing:
            yield
            return
        with self._condition:
            if me in self._readers:
                self._readers[me] += 1
            else:
                self._wait_shared()
                self._readers[me] = 1
        try:
            yield
        finally:
            with self._condition:
                self._left(me)

    @contextlib.contextmanager
    def helping(self) -> Iterator[None]:
        """Read along with another thread that reads and waits for this one: never waits for the lock itself.

        `alone` raises `HelperThread` within, because the thread that waits could not step out of reading.
        """
        me = threading.get_ident()
        with self._condition:
            self._readers[me] = self._readers.get(me, 0) + 1
            self._helpers.add(me)
        try:
            yield
        finally:
            with self._condition:
                self._helpers.discard(me)
                self._left(me)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it alone. What this thread holds with others it gives up for that time, and takes again afterwards."""
        me = threading.get_ident()
        with self._condition:
            if me in self._helpers:
                raise HelperThread
            held = self._readers.pop(me, 0)
            if self._writer != me:
                if held:
                    self._condition.notify_all()
                self._wait(lambda: self._writer is None and not self._readers)
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    if held:
                        self._readers[me] = held
                    self._condition.notify_all()

    def _left(self, me: int) -> None:
        """This thread reads once less. To be called with the condition held, as those below."""
        self._readers[me] -= 1
        if not self._readers[me]:
            del self._readers[me]
            self._ended += 1
            self._condition.notify_all()

    def _wait(self, free: Callable[[], bool]) -> None:
        """Wait for one's turn, and for ``free()`` then."""
        with self._queueing() as ticket:
            self._condition.wait_for(lambda: self._queue[0] is ticket and free())

    def _wait_shared(self) -> None:
        """Wait for a reader's turn."""
        with self._queueing() as ticket:
            waited, ended = 0.0, self._ended
            while not self._condition.wait_for(
                lambda: self._queue[0] is ticket and self._writer is None, self._patience_seconds
            ):
                if self._writer is None and self._readers and self._ended == ended:
                    return
                ended = self._ended
                if waited < _WORTH_TELLING_SECONDS <= (waited := waited + self._patience_seconds):
                    _log.warning(
                        "this load has waited %.0f s for one that is left to its own library and runs alone; if that"
                        " one waits for this thread, neither will end: call wl.install(), or load in its own thread",
                        waited,
                    )

    @contextlib.contextmanager
    def _queueing(self) -> Iterator[object]:
        ticket = object()
        self._queue.append(ticket)
        try:
            yield ticket
        finally:
            self._queue.remove(ticket)
            self._condition.notify_all()


LOADING = FairLock()
"""Held shared by native loads of other libraries' models, alone by every load through such a library's own code."""


def native_or_alone(cls: Any, native: Callable[[], T], original: Callable[[], T]) -> T:
    """``native()`` beside other loads; where that raises `NotNative`, ``original()`` while no other load runs.

    In a thread that runs alone already it is ``original()`` at once: that load came from the library's own code. Raises
    what they raise, and `HelperThread` in a helper that would have to run alone.
    """
    from weightlift.ambient import Undisturbed  # here: this is imported before torch is

    if LOADING.writing:
        return original()
    try:
        with LOADING.shared(), Undisturbed():
            return native()
    except NotNative as found:
        reason = found.what, found.why  # and not the error: it holds all that was tried
    with LOADING.alone():  # which a helper leaves to the thread that it helps, the telling too
        _log.info("%s: loaded by its own library, alone in the process: %s (%s)", cls.__name__, *reason)
        return original()
