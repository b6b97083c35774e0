"""What a load works on: the module with its tapes, and where values come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weightlift.checkpoint.entry import ShardFile
from weightlift.checkpoint.integrity import Digest
from weightlift.deferred.doubles import Change
from weightlift.deferred.inventory import Inventory, is_lazy
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.tape import Record


@dataclass(frozen=True, slots=True)
class Subject:
    """The module that a plan was made for: its slots, and the tapes it was built with (None: it was built ordinarily).

    ``existing``: it is a user's, and was there before.
    """

    inventory: Inventory
    recorder: Recorder | None
    existing: bool = False

    def record_of(self, tensor: torch.Tensor) -> Record | None:
        """The tape of a tensor, if it has one."""
        return None if self.recorder is None else self.recorder.record_of(tensor)

    def record_at(self, tensor: torch.Tensor, address: int) -> Record | None:
        """`record_of`, where ``address``, the tensor's `storage_address`, is known."""
        return None if self.recorder is None else self.recorder.record_at(tensor, address)

    def records(self) -> list[Record]:
        """The tapes of all parameters and buffers, each once."""
        found = (self.record_of(slot.tensor) for slot in self.inventory.slots if not is_lazy(slot.tensor))
        return list(dict.fromkeys(record for record in found if record is not None))


@dataclass(frozen=True, slots=True)
class Bytes:
    """Where values come from: files (with the hashes to check, if any), tensors in memory, values of extra state by
    name; and the ``changes`` that the module's state-dict hooks make to it.
    """

    files: tuple[ShardFile, ...]
    tensors: Mapping[str, torch.Tensor]
    extras: Mapping[str, Any]
    changes: tuple[Change, ...] = ()
    digests: Mapping[Path, Digest] = field(default_factory=dict)
