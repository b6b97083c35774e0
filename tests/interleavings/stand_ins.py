"""What stands in for ``threading`` in the modules that are looked at: waiting in it means to pass on one's turn.

Only one thread of a run is awake, so nothing here needs a lock of its own. Outside a run each works as far as one
thread needs it, so that modules can be used before and after.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from tests.interleavings import explorer


def _wait(may_go: Callable[[], bool], timeout: float | None = None) -> bool:
    if explorer._current is None:
        assert may_go() or timeout is not None, "outside a run nobody else could end this"
        return may_go()
    return explorer.current().wait(may_go, timed=timeout is not None)


class Lock:
    def __init__(self) -> None:
        self._owner: Any = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not self._free() and (not blocking or not _wait(self._free, None if timeout < 0 else timeout)):
            return False
        self._owner = threading.get_ident()
        self._depth += 1
        return True

    def _free(self) -> bool:
        return self._owner is None

    def release(self) -> None:
        if self._owner is None:
            raise RuntimeError("release unlocked lock")
        self._depth -= 1
        if not self._depth:
            self._owner = None

    def locked(self) -> bool:
        return self._owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        # A run that failed unwinds its threads in any order.
        if self._owner is not None:
            self.release()


class RLock(Lock):
    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._owner == threading.get_ident():
            self._depth += 1
            return True
        return super().acquire(blocking, timeout)


class Condition:
    def __init__(self, lock: Any = None) -> None:
        self._lock = RLock() if lock is None else lock
        self._waiting: list[list[bool]] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return bool(self._lock.__enter__())

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__()

    def wait(self, timeout: float | None = None) -> bool:
        told = [False]
        self._waiting.append(told)
        depth, self._lock._depth, self._lock._owner = self._lock._depth, 0, None
        try:
            _wait(lambda: told[0], timeout)
        finally:
            self._waiting = [other for other in self._waiting if other is not told]
            self._lock.acquire()
            self._lock._depth = depth
        return told[0]

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        while not (found := predicate()):
            if not self.wait(timeout) and timeout is not None:
                return predicate()
        return found

    def notify(self, n: int = 1) -> None:
        for told in self._waiting[:n]:
            told[0] = True
        del self._waiting[:n]

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class Event:
    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return _wait(lambda: self._set, timeout)


class Semaphore:
    def __init__(self, value: int = 1) -> None:
        self._value = value

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if not self._value and (not blocking or not _wait(lambda: self._value > 0, timeout)):
            return False
        self._value -= 1
        return True

    def release(self, n: int = 1) -> None:
        self._value += n

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Thread:
    """A thread that joins the run."""

    def __init__(
        self, target: Callable[..., Any], args: tuple[Any, ...] = (), name: str = "", daemon: bool = False
    ) -> None:
        self._body = lambda: target(*args)
        self._worker: Any = None

    def start(self) -> None:
        self._worker = explorer.current().add(self._body)

    @property
    def ident(self) -> int | None:
        return None if self._worker is None else self._worker.thread.ident

    def is_alive(self) -> bool:
        return self._worker is not None and not self._worker.ended

    def join(self, timeout: float | None = None) -> None:
        _wait(lambda: self._worker.ended, timeout)


class Threading:
    """The module ``threading``, but for what threads wait in."""

    Lock, RLock, Condition, Event, Semaphore, Thread = Lock, RLock, Condition, Event, Semaphore, Thread

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


def stand_in(patch: Any, *modules: Any) -> None:
    """Put the stand-ins into modules, also for the locks that they made when they were imported."""
    real = {type(threading.Lock()): Lock, type(threading.RLock()): RLock}
    for module in modules:
        if hasattr(module, "threading"):
            patch.setattr(module, "threading", Threading())
        for name, value in list(vars(module).items()):
            if type(value) in real:
                patch.setattr(module, name, real[type(value)]())
            for kept in ("own", "_lock"):  # of a lock that forked children find free, of the one between loads
                if type(getattr(value, kept, None)) in real:
                    patch.setattr(value, kept, real[type(getattr(value, kept))]())
