"""Locks that are there for the whole process, and that forked children find in order.

One of them lies between loads that keep their state to themselves and those of others that patch the process. A native
load, or a constructor that is run for one, is a reader: any number run at once. A load through somebody else's code,
which replaces functions for its duration, is the writer: it runs alone. Waiting is first come, first served, so neither
kind starves; but where no reader ends for a while, one may be waiting for the very thread that queues behind a writer,
and that is let in.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

_log = logging.getLogger("weightlift")

PATIENCE_SECONDS = 5.0
_WORTH_TELLING_SECONDS = 60.0
_WAITS = (
    "this load has waited %.0f s for one that is left to its own library and runs alone; if that one waits for this"
    " thread, neither will end: call wl.install(), or load in its own thread"
)
_WAITS_ALONE = (
    "this load, which is left to its own library, has waited %.0f s to run alone; if one that runs waits for this"
    " thread, neither will end: load in that one's thread, or after it"
)
_COMING = object()  # what a thread reads for whose turn has just come
_TORN = (
    "this process was forked while another thread loaded a model by the model's own library, which replaces functions"
    " for that time: here they stay replaced, and models would be wrong. Fork before such a load or after it, or start"
    " processes with 'spawn'"
)


class Lock:
    """``own``: the lock itself, to be looked up each time it is taken. A forked child has another one."""

    __slots__ = ("__weakref__", "_reentrant", "own")

    def __init__(self, *, reentrant: bool = False) -> None:
        self._reentrant = reentrant
        self.renew()
        _known.add(self)

    def renew(self) -> None:
        """Nobody holds it."""
        self.own: Any = threading.RLock() if self._reentrant else threading.Lock()


class HelperThread(Exception):
    """A helper thread of a load came to something that has to run alone: the thread that it helps has to do that."""


class FairLock:
    """A readers–writer lock, fair and re-entrant; a thread that reads may step out of reading in order to write.

    A writer may read and write again within; to a thread that only reads, reading again costs nothing and never waits.
    A reader overtakes the writers before it when others read and none of them has ended for ``patience_seconds``.
    An interrupt, which may come at any call, leaves nothing taken and nobody in the queue.
    """

    def __init__(self, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._patience_seconds = patience_seconds
        self._lock = threading.RLock()  # of what follows
        self._queue: deque[Any] = deque()  # who waits: each a lock that is released to have it look again
        self._readers: dict[int, frozenset[object]] = {}  # what each thread reads for; that may end in any order
        self._stepped_out: frozenset[int] = frozenset()  # readers that write meanwhile, or wait for that
        self._helpers: set[int] = set()
        self._writer: int | None = None
        self._ended = 0  # readers, so far
        self._torn = False

    @property
    def writing(self) -> bool:
        """True in the thread that holds the lock alone."""
        return self._writer == threading.get_ident()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it with other readers."""
        if self.writing:
            yield
            return
        with self._reading(waits=True):
            yield

    @contextlib.contextmanager
    def helping(self) -> Iterator[None]:
        """Read along with another thread that reads and waits for this one: never waits for the lock itself.

        `alone` raises `HelperThread` within, because the thread that waits could not step out of reading.
        """
        me = threading.get_ident()
        try:
            self._helpers.add(me)
            with self._reading(waits=False):
                yield
        finally:
            self._helpers.discard(me)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it alone. What this thread holds with others it gives up for that time, and takes again afterwards."""
        me = threading.get_ident()
        if self.writing:
            yield
            return
        if me in self._helpers:
            raise HelperThread
        try:
            with self._lock:
                self._stepped_out |= {me}
            self._wake()
            self._take(alone=True)
            yield
        finally:
            with self._lock:
                self._stepped_out -= {me}
                if self._writer == me:
                    self._writer = None
            self._wake()

    def forked(self) -> None:
        """To be called in a forked child, where only the thread that forked is left."""
        me = threading.get_ident()
        self._torn = self._torn or self._writer not in (None, me)
        self._lock = threading.RLock()
        self._queue.clear()
        self._readers = {thread: scopes for thread, scopes in self._readers.items() if thread == me}
        self._stepped_out &= {me}
        self._helpers &= {me}

    @contextlib.contextmanager
    def _reading(self, *, waits: bool) -> Iterator[None]:
        """This thread reads once more."""
        me, scope = threading.get_ident(), object()
        try:
            if waits and me not in self._readers:
                self._take(alone=False)
            with self._lock:
                self._readers[me] = self._readers.get(me, frozenset()) - {_COMING} | {scope}
            yield
        finally:
            with self._lock:  # no call from here on: that is where interrupts come
                if me in self._readers:
                    left = self._readers[me] - {_COMING, scope}
                    if left:
                        self._readers[me] = left
                    else:
                        del self._readers[me]
                        self._ended += 1
            self._wake()

    def _take(self, *, alone: bool) -> None:
        """Wait for this thread's turn, and take it."""
        if self._torn:
            raise RuntimeError(_TORN)
        turn = threading.Lock()
        turn.acquire()
        seconds = _WORTH_TELLING_SECONDS if alone else self._patience_seconds
        waited, ended, impatient = 0.0, self._ended, False
        try:
            self._queue.append(turn)
            while not self._took(turn, alone=alone, impatient=impatient):
                if turn.acquire(timeout=seconds):
                    impatient, ended = False, self._ended
                    continue
                impatient, ended = not alone and ended == self._ended, self._ended
                if waited < _WORTH_TELLING_SECONDS <= (waited := waited + seconds):
                    _log.warning(_WAITS_ALONE if alone else _WAITS, waited)
                    seconds = -1 if alone else seconds
        finally:
            with self._lock:
                first = bool(self._queue) and self._queue[0] is turn
                if turn in self._queue:
                    self._queue.remove(turn)
            if first:
                self._wake()

    def _took(self, turn: Any, *, alone: bool, impatient: bool) -> bool:
        me = threading.get_ident()
        with self._lock:
            first = self._queue[0] is turn
            if alone and first and self._writer is None and not self._reading_now():
                self._writer = me
            elif not alone and self._writer is None and (first or (impatient and self._reading_now())):
                self._readers[me] = frozenset([_COMING])
            else:
                return False
        return True

    def _reading_now(self) -> bool:
        return bool(self._readers.keys() - self._stepped_out)

    def _wake(self) -> None:
        """Something changed that some may be waiting for."""
        with self._lock:
            for turn in self._queue:
                if turn.locked():
                    turn.release()


_known: weakref.WeakSet[Lock] = weakref.WeakSet()
LOADING = FairLock()
"""Held shared by native loads of other libraries' models, alone by every load through such a library's own code."""


def _forked() -> None:
    LOADING.forked()
    for lock in list(_known):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
