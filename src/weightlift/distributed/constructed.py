"""Values of constructors that ran ordinarily (``defer=False``): whether all ranks have the same.

Deferred, what is missing is initialised alike on all ranks. A constructor that samples for itself does not know of
other ranks; what the checkpoint lacks would differ, or be shards of different tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from weightlift.deferred.inventory import Slot, is_lazy
from weightlift.distributed.digest import named
from weightlift.distributed.shapes import is_dtensor
from weightlift.errors import Problem
from weightlift.plan.records import Action, Row
from weightlift.transfer.memory import bytes_of_values
from weightlift.unstrided import unstrided


def note_of_missing(slots: Sequence[Slot], rows: Sequence[Row]) -> str:
    """Hashes by name of what the checkpoint does not provide, each tensor once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for slot, row in zip(slots, rows, strict=True):
        tensor = slot.tensor
        whole = not (is_lazy(tensor) or is_dtensor(tensor) or tensor.is_meta or unstrided(tensor))
        if whole and row.action in (Action.INITIALISED, Action.MISMATCHED):
            found.setdefault(id(tensor), (slot.fqn, tensor))
    return json.dumps({fqn: _hash(tensor) for fqn, tensor in found.values()})


def differences(notes: Sequence[str], ranks: Sequence[int]) -> list[Problem]:
    """The names whose values are not the same on all ranks. ``ranks`` wrote the notes, in order."""
    first, *others = (json.loads(note) for note in notes)
    problems = []
    for fqn, value in first.items():
        differing = [rank for rank, note in zip(ranks[1:], others, strict=True) if note.get(fqn) != value]
        if differing:
            text = f"missing in the checkpoint, and its constructor gave it other values on {named(differing)}"
            hint = "leave out defer=False, or seed torch alike on every rank"
            problems.append(Problem(f"{text} than on rank {ranks[0]}", fqn=fqn, hint=hint))
    return problems


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(bytes_of_values(tensor), digest_size=16).hexdigest()
