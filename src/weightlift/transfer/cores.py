"""The processor's cores, which all loads of the process share."""

from __future__ import annotations

import os
import threading

_shared: tuple[int, threading.Semaphore] = (0, threading.Semaphore())


def cores() -> threading.Semaphore:
    """To be held while a thread copies or converts: as many at once as there are cores, whatever the loads.

    More threads than cores help while they wait for a disk. What is cached needs the processor only, and more threads
    than cores merely push each other's blocks out of the cache. A forked child gets a semaphore of its own, since in
    its copy nobody would give back what was held. Replacing the pair is atomic; two threads that come first at the same
    time may use two semaphores, which does no harm.
    """
    global _shared
    process = os.getpid()
    if _shared[0] != process:
        _shared = (process, threading.Semaphore(_count()))
    return _shared[1]


def _count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
