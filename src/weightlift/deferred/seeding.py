"""Noticing that a constructor seeds the process's generator, without touching it.

A constructor that calls ``torch.manual_seed(42)`` means the values which that seed gives: from there on its sampling
runs at once, until it puts the state back (``fork_rng``). No mode sees the call. It leaves traces: while CUDA is not
initialised torch queues every seeding together with the stack it came from, so that ours can be told from another
thread's; and ``torch.initial_seed()`` changes.

The state of the generator is never read: ``torch.get_rng_state`` wraps its result while it holds the generator's lock,
and that allocation may run the garbage collector, whose finalisers let the interpreter lock go. A thread that asks for
the lock meanwhile holds the interpreter while it waits, and both wait for ever. ``torch.initial_seed()`` takes no lock.
What that costs: a constructor that forks the generator, seeds it with the very seed that the process has, and samples
again after the fork, samples at once there too.
"""

from __future__ import annotations

import os

import torch

_initial_seed = torch.default_generator.initial_seed
_HERE = tuple(os.path.join("weightlift", "deferred", name) for name in ("construct.py", "rewrite.py"))


class SeedWatch:
    """Remembers the seed that the process's generator had when the scope began. Reads it, never writes."""

    def __init__(self) -> None:
        self._tracker = getattr(torch.cuda, "_lazy_seed_tracker", None)
        self._token = getattr(self._tracker, "manual_seed_all_cb", None)
        self._initial_seed = _initial_seed()
        self._foreign = False
        self._seeded = False
        self._returns = True

    def seeded(self) -> bool:
        """True while the process's generator is in a state that the constructor of this scope asked for."""
        tracker = self._tracker
        if (
            not self._seeded
            and (tracker is None or tracker.manual_seed_all_cb is self._token)
            and _initial_seed() == self._initial_seed
        ):
            return False  # every sampling call of a constructor asks
        if tracker is not None and tracker.manual_seed_all_cb is not self._token:
            self._token = tracker.manual_seed_all_cb
            if any(here in line for line in self._token[1] for here in _HERE):
                self._begin()
            else:
                self._foreign = True  # another thread's; the seed that it leaves behind is the new normal
        elif not self._seeded and _initial_seed() != self._initial_seed:
            if self._foreign:
                self._initial_seed = _initial_seed()
                self._foreign = False
            else:
                self._begin()
        if self._seeded and self._returns and _initial_seed() == self._initial_seed:
            self._seeded = False
        return self._seeded

    def _begin(self) -> None:
        self._seeded = True
        # Seeded with the seed of the beginning: there is no telling this from putting that state back.
        self._returns = _initial_seed() != self._initial_seed
