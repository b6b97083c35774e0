"""The end of a deferred construction: small tensors leave the blocks that they were cut from.

Torch grows no storage that lies on memory of somebody else's, and some modules resize their buffers when they run
(``self.min_val.resize_(n)``). Small tensors that still lie in reserved memory, because they were initialised or kept
their values, get memory of torch's own, which also lets their block go. For big ones that would cost time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from weightlift.ambient import outside_modes
from weightlift.deferred.inventory import Slot, has_other_users, storage_address
from weightlift.deferred.tape import Record
from weightlift.lazy_views import shown, shown_as

SMALL_BYTES = 64 << 10


def settle_small(slots: Iterable[Slot], records: Iterable[Record]) -> None:
    """Move what is small of ``records``, the tapes of ``slots``, to ordinary memory: whole storages, with all their
    tensors. One that others lie on as well, or whose address somebody knows, stays."""
    staying = {record.key: record for record in records if _may_move(record)}
    if not staying:
        return
    with outside_modes(), torch.no_grad():
        alone, together = _lying_at(slots, staying)
        for address, tensor in alone.items():
            if address not in together:
                _move([tensor], address, staying[address])
        for address, tensors in together.items():
            _move(tensors, address, staying[address])


def _may_move(record: Record) -> bool:
    return record.nbytes <= SMALL_BYTES and record() is not None and not (record.pinned or record.pending)


def _lying_at(
    slots: Iterable[Slot], addresses: dict[int, Record]
) -> tuple[dict[int, torch.Tensor], dict[int, list[torch.Tensor]]]:
    """The first tensor of a module on each of certain storages, and all of them, each once, where there are several.

    A list for every storage would be as many more objects for the collector.
    """
    first: dict[int, torch.Tensor] = {}
    several: dict[int, list[torch.Tensor]] = {}
    for slot in slots:
        tensor = slot.held()
        address = storage_address(tensor)
        if address not in addresses or (before := first.setdefault(address, tensor)) is tensor:
            continue
        group = several.setdefault(address, [before])
        if not any(tensor is other for other in group):
            group.append(tensor)
    return first, several


def _move(tensors: list[torch.Tensor], address: int, record: Record) -> None:
    if has_other_users(tensors[0], address, len(tensors)) or any(tensor.is_inference() for tensor in tensors):
        return  # an inference tensor can't be re-pointed
    first = tensors[0]
    if len(tensors) == 1 and first.nbytes == record.nbytes and first.is_contiguous() and not any(shown(first)):
        first.data = first.detach().clone()  # as nearly all are
        return
    new = torch.frombuffer(record.memory(), dtype=torch.uint8).clone().untyped_storage()
    for tensor in tensors:
        plain = torch.empty(0, dtype=tensor.dtype, device="cpu")
        plain.set_(new, tensor.storage_offset(), tensor.size(), tensor.stride())
        tensor.data = shown_as(plain, shown(tensor))
