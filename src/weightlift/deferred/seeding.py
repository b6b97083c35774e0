"""Noticing that a constructor seeds the process's generator, without touching it.

A constructor that calls ``torch.manual_seed(42)`` means the values which that seed gives: from there on its sampling
runs at once. The call itself goes through no mode. It does leave a trace: while CUDA is not initialised torch queues
every seeding together with the stack it came from, so that ours can be told from another thread's. Where there is no
such queue, a changed ``torch.initial_seed()`` is the sign.
"""

from __future__ import annotations

import os

import torch

_HERE = os.path.join("weightlift", "deferred", "construct.py")


class SeedWatch:
    """Remembers the seeding that was current when the scope began."""

    def __init__(self) -> None:
        self._seeded = False
        self._tracker = getattr(torch.cuda, "_lazy_seed_tracker", None)
        self._token = getattr(self._tracker, "manual_seed_all_cb", None)
        self._initial_seed = torch.initial_seed()

    def seeded(self) -> bool:
        """True once the constructor of this scope has seeded the process's generator."""
        if self._seeded:
            return True
        tracker = self._tracker
        if tracker is None or torch.cuda.is_initialized():
            self._seeded = torch.initial_seed() != self._initial_seed
        elif tracker.manual_seed_all_cb is not self._token:
            self._token = tracker.manual_seed_all_cb
            self._seeded = any(_HERE in line for line in self._token[1])
        return self._seeded
