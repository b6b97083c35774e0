"""Values that lie in the very memory that a load writes to: ``{"a": m.b.weight, "b": m.a.weight}`` into ``m``.

Whoever came first would change what the other one still has to read. Such values are taken aside before anything is
written, so that what arrives is what the checkpoint held when the load began, whatever the order and the threads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

import torch

from weightlift.checkpoint.entry import TensorEntry
from weightlift.lazy_views import shown, shown_as
from weightlift.strides import row_major
from weightlift.transfer.jobs import Job

_Range = tuple[int, int]


def apart(jobs: Sequence[Job], tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """``tensors``, with copies in the place of those that lie where ``jobs`` write something else."""
    if not tensors:
        return tensors
    written = _Memory(job.into for job in jobs if job.into is not None and not job.fresh)
    if not written:
        return tensors
    found: dict[str, torch.Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for job in jobs:
        for entry in job.entries:
            if entry.file is not None or entry.key in found:
                continue
            tensor = tensors[entry.key]
            if tensor in written and not _same_place(tensor, entry, job.into):
                found[entry.key] = _copied(tensor.detach(), storages)
    return {**tensors, **found} if found else tensors


class _Memory:
    """Ranges of addresses, by kind of device."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        ranges: dict[torch.device, list[_Range]] = {}
        for tensor in tensors:
            if (found := _range(tensor)) is not None:
                ranges.setdefault(tensor.device, []).append(found)
        self._ranges = {device: _merged(found) for device, found in ranges.items()}

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        known, found = self._ranges.get(tensor.device), _range(tensor)
        if known is None or found is None:
            return False
        place = bisect_right(known, (found[1] - 1, found[1] - 1))
        return any(low < found[1] and found[0] < high for low, high in known[max(place - 1, 0) : place + 1])


def _range(tensor: torch.Tensor) -> _Range | None:
    """Where its storage lies; None for tensors without one, or without an address."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return None
    try:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
    except (RuntimeError, NotImplementedError):  # subclasses that only wrap others
        return None
    return (start, start + storage.nbytes()) if storage.nbytes() and start else None


def _merged(ranges: list[_Range]) -> list[_Range]:
    merged: list[_Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], high)
        else:
            merged.append((low, high))
    return merged


def _same_place(tensor: torch.Tensor, entry: TensorEntry, into: torch.Tensor | None) -> bool:
    """Whether what is read is what is written, element by element, so that nothing changes."""
    return (
        into is not None
        and tensor.dtype == into.dtype
        and tensor.data_ptr() + entry.start == into.data_ptr()
        and entry.shape == tuple(into.shape)
        and (row_major(entry.shape) if entry.stride is None else entry.stride) == into.stride()
        and shown(tensor) == shown(into)
    )


def _copied(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    """The same view of a copy of its storage, of which there is one for all."""
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    if address not in storages:
        storages[address] = storage.clone()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        plain.set_(storages[address], tensor.storage_offset(), tensor.size(), tensor.stride())
        return shown_as(plain, shown(tensor))
