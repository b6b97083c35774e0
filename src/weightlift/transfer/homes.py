"""Storages that several tensors of a module share, and that a plan casts or moves: done once for the storage.

Were each tensor cast by itself, a weight and its view, or two parameters on one storage, would part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from weightlift.deferred.inventory import Slot, is_lazy
from weightlift.deferred.tape import Record
from weightlift.lazy_views import shown, shown_as
from weightlift.plan.records import Row
from weightlift.strides import span_elements
from weightlift.transfer.accelerator import same_device
from weightlift.transfer.adopt import holds_its_bytes
from weightlift.transfer.memory import new_memory


class Member(NamedTuple):
    """A row, its slot, and what the tensor there lay on when the execution began: its storage's address, and the tape
    of that, if it has one."""

    row: Row
    slot: Slot
    address: int
    record: Record | None


@dataclass(frozen=True, slots=True)
class NewHome:
    """New memory for the elements from ``start`` on of a storage; ``members`` are the rows that move in."""

    flat: torch.Tensor
    start: int
    members: tuple[Member, ...]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """What becomes of ``tensor``: the same view, of the new memory."""
        plain = self.flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset() - self.start)
        return shown_as(plain, shown(tensor))

    def take_over(self) -> None:
        """Convert what the storage holds, once."""
        tensor = self.members[0].slot.tensor.detach()
        if not tensor.is_meta:
            lies = shown_as(tensor, shown(tensor))
            self.flat.copy_(lies.as_strided(self.flat.size(), (1,), self.start))


def fits(row: Row, tensor: torch.Tensor) -> bool:
    """Whether a tensor can hold its row's value as it is."""
    if is_lazy(tensor) or tensor.dtype != row.dtype:
        return False
    return same_device(tensor.device, torch.device(row.device))


def in_its_order(row: Row, tensor: torch.Tensor) -> torch.Tensor | None:
    """New memory for a value that is cast or moved, in the order of the tensor that it is for, as ``tensor.to`` keeps
    it; None where that is row-major, or where the value belongs somewhere else."""
    if not row.in_place or row.untied or fits(row, tensor) or is_lazy(tensor) or tensor.is_contiguous():
        return None
    if row.shape != tuple(tensor.shape) or not holds_its_bytes(tensor):
        return None
    stride = torch.empty_like(tensor, device="meta").stride()
    return new_memory((tensor.numel(),), row.dtype, torch.device(row.device)).as_strided(row.shape, stride)


def homes(members: Iterable[Member]) -> dict[int, NewHome]:
    """A new home, by address, for every storage that more than one of ``members`` share and whose tensors do not fit.

    Tensors that the plan gives different dtypes or devices part, as they must.
    """
    storages: dict[int, list[Member]] = {}
    for member in members:
        storages.setdefault(member.address, []).append(member)
    found = {}
    for address, group in storages.items():
        row, slot, *_ = group[0]
        setting = {(row.dtype, row.device, slot.tensor.dtype) for row, slot, *_ in group}
        if len({id(slot.tensor) for _, slot, *_ in group}) < 2 or len(setting) > 1 or fits(row, slot.tensor):
            continue
        tensors = [slot.tensor for _, slot, *_ in group if slot.tensor.numel()]
        start = min((int(tensor.storage_offset()) for tensor in tensors), default=0)
        ends = (int(tensor.storage_offset()) + span_elements(tensor.size(), tensor.stride()) for tensor in tensors)
        size = max(ends, default=start) - start
        found[address] = NewHome(new_memory((size,), row.dtype, torch.device(row.device)), start, tuple(group))
    return found
