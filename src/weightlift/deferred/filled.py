"""Which memory a rehearsal of ``load_state_dict`` has given values, under which names, and whether they stayed."""

from __future__ import annotations

from collections.abc import Collection

import torch

from weightlift.deferred.stand_ins import StandIns


class Filled:
    """What was loaded into stand-ins, in the order of the walk."""

    def __init__(self, stand_ins: StandIns) -> None:
        self._stand_ins = stand_ins
        self._names: dict[str, tuple[object, object]] = {}  # name → its memory, and what stood there then
        self._offered: dict[object, object] = {}  # memory → what stood there after its last value of the checkpoint

    def note(self, fqn: str, tensor: torch.Tensor, *, offered: bool) -> None:
        """A name has got its value just now. ``offered``: that of the checkpoint, and not one that code made."""
        memory, state = self._stand_ins.memory(tensor), self._stand_ins.state(tensor)
        self._names[fqn] = memory, state
        if offered:
            self._offered[memory] = state

    def provided(self, names: Collection[str]) -> set[object]:
        """Memory that was filled under one of ``names``."""
        return {memory for fqn, (memory, _) in self._names.items() if fqn in names}

    def is_outdated(self, fqn: str, tensor: torch.Tensor) -> bool:
        """Whether code wrote into a tensor after it was loaded: that of a sibling, or of a module tied to it.

        Another value of the checkpoint is none of that: two names of one memory, of which the plan decides.
        """
        if fqn not in self._names:
            return False
        (memory, before), now = self._names[fqn], self._stand_ins.state(tensor)
        return memory == self._stand_ins.memory(tensor) and now not in (before, self._offered.get(memory))
