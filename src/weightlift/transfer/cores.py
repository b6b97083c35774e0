"""The processor's cores, which all loads of the process share."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator


class Cores:
    """``with cores:`` while a thread copies or converts: as many at once as there are cores, whatever the loads.

    The main thread is always let through. Ctrl-C comes to it, between any two steps of Python code, and a semaphore is
    Python code: a core that it has or gives back just then would be lost, or nobody could take one any more, and every
    later load would wait for good.
    """

    def __init__(self, count: int) -> None:
        self._free = threading.Semaphore(count)

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self._free.acquire()

    def __exit__(self, *exc: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            self._free.release()

    @contextlib.contextmanager
    def given_back(self) -> Iterator[None]:
        """Let another thread have this one's core, and wait for one afterwards, on every way out."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


_shared: tuple[int, Cores] = (0, Cores(1))


def cores() -> Cores:
    """Those of this process.

    More threads than cores help while they wait for a disk. What is cached needs the processor only, and more threads
    than cores merely push each other's blocks out of the cache. A forked child gets cores of its own, since in
    its copy nobody would give back what was held. Replacing the pair is atomic; two threads that come first at the same
    time may use two, which does no harm.
    """
    global _shared
    process = os.getpid()
    if _shared[0] != process:
        _shared = (process, Cores(_count()))
    return _shared[1]


def _count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
