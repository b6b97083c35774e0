"""Noticing that a constructor seeds the process's generator, without touching it.

A constructor that calls ``torch.manual_seed(42)`` means the values which that seed gives: from there on its sampling
runs at once. The call itself goes through no mode. It does leave a trace: while CUDA is not initialised torch queues
every seeding together with the stack it came from, so that ours can be told from another thread's. Where there is no
such queue, a changed ``torch.initial_seed()`` is the sign.
"""

from __future__ import annotations

import os
from typing import Any

import torch

_HERE = os.path.join("weightlift", "deferred", "construct.py")


class SeedWatch:
    """Remembers the seeding that was current when the scope began."""

    def __init__(self) -> None:
        self._seeded = False
        self._token = _last_seeding()
        self._initial_seed = torch.initial_seed()

    def seeded(self) -> bool:
        """True once the constructor of this scope has seeded the process's generator."""
        if self._seeded:
            return True
        token = _last_seeding()
        if token is not None:
            if token is not self._token:
                self._token = token
                self._seeded = any(_HERE in line for line in token[1])
        elif torch.initial_seed() != self._initial_seed:
            self._seeded = True
        return self._seeded


def _last_seeding() -> Any:
    """The latest queued seeding: (callback, formatted stack); None when torch keeps none."""
    cuda = torch.cuda
    if cuda.is_initialized():
        return None
    return getattr(getattr(cuda, "_lazy_seed_tracker", None), "manual_seed_all_cb", None)
