"""The memory that the tensors of one scope were born in, and the record of each storage."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from weightlift.deferred.neighbours import Wish, meet, under_way
from weightlift.deferred.piecemeal import is_ready
from weightlift.deferred.reserve import Reservations
from weightlift.deferred.tape import Record, forget, new_record

_storage_address = torch._C._storage_address  # type: ignore[attr-defined]


class Memory:
    """Reserves it, and knows it again by a tensor's storage. Its buffers may die on any thread."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}
        self.wishes: deque[Wish] = deque()
        self.under_way = 0  # 1 while it is
        self._reservations = Reservations()
        self._on_death: Callable[[Any], object] = functools.partial(forget, self.records)

    def reserve(self, nbytes: int, dtype: torch.dtype) -> tuple[torch.Tensor, Record]:
        """A flat tensor over new reserved memory, and its record."""
        buffer, block, offset = self._reservations.reserve(nbytes)
        tensor = torch.frombuffer(buffer, dtype=dtype)
        key = _storage_address(tensor)
        self.records[key] = record = new_record(buffer, self._on_death, key, nbytes, block, offset)
        return tensor, record

    def record_of(self, tensor: torch.Tensor) -> Record | None:
        """The record of a tensor's storage; None for memory that was not born in this scope."""
        try:
            address = _storage_address(tensor)
        except (RuntimeError, NotImplementedError):  # no storage: sparse, functional, batched tensors
            return None
        return self.record_at(address)

    def record_at(self, address: int) -> Record | None:
        """`record_of`, where ``address``, the tensor's `storage_address`, is known."""
        record = self.records.get(address)
        if record is None and len(under_way) > self.under_way:
            meet(self, address)  # it may be another construction's
        return record

    def hand_out(self, record: Record, why: Any) -> None:
        """Give a storage its values, and put no later write to it off: somebody else may hold the memory."""
        raise NotImplementedError

    def takes_writes(self, tensor: torch.Tensor) -> bool:
        """Whether a part of it can be written to at once, with nothing to run before: then it is taken to be."""
        record = self.record_of(tensor)
        if record is None or not is_ready(record):
            return False
        record.pieces += 1
        return True
