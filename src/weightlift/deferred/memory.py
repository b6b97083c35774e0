"""The memory that the tensors of one scope were born in, and the record of each storage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from weightlift.deferred.piecemeal import is_ready
from weightlift.deferred.reserve import Reservations
from weightlift.deferred.tape import Record, forget, new_record

_storage_address = torch._C._storage_address  # type: ignore[attr-defined]


class Outer(Protocol):
    """What is asked of a scope around this one."""

    def give_up(self, tensors: list[torch.Tensor], why: Any) -> None:
        """Give these tensors their values, and put no later write to them off."""


class Memory:
    """Reserves it, and knows it again by a tensor's storage. Its buffers may die on any thread."""

    def __init__(self, outer: tuple[Outer, ...] = ()) -> None:
        self.records: dict[int, Record] = {}
        self._outer = outer
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
        return self.record_at(tensor, address)

    def record_at(self, tensor: torch.Tensor, address: int) -> Record | None:
        """`record_of`, where ``address``, the tensor's `storage_address`, is known."""
        record = self.records.get(address)
        if record is None and address >= 0:
            for outer in self._outer:
                outer.give_up([tensor], "a load within the constructor")
        return record

    def takes_writes(self, tensor: torch.Tensor) -> bool:
        """Whether a part of it can be written to at once, with nothing to run before: then it is taken to be."""
        record = self.record_of(tensor)
        if record is None or not is_ready(record):
            return False
        record.pieces += 1
        return True
