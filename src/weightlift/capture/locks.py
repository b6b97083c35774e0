"""Locks that a forked child finds free: of the threads that may have held one, it has only that which forked."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any


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


_known: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forked() -> None:
    for lock in list(_known):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
