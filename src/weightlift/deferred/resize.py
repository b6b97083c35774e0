"""``resize_`` of deferred tensors."""

from __future__ import annotations

from math import prod
from typing import Any, Protocol

import torch

from weightlift.deferred.tape import Record


class Reserving(Protocol):
    """What this needs of the recorder that asks."""

    def record_of(self, tensor: torch.Tensor) -> Record | None:
        """What is known of the tensor's storage, if it is a deferred one."""
        ...

    def reserve(self, nbytes: int, dtype: torch.dtype) -> tuple[torch.Tensor, Record]:
        """New reserved memory."""
        ...

    def force(self, records: list[Record], why: Any) -> None:
        """Give storages their values now."""
        ...


def resized(recorder: Reserving, func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """Answer ``resize_``: reserved storages can't grow, so the tensor moves to a new one and takes its values along.

    None for memory that is somebody else's, which torch grows itself.
    """
    tensor, size = args[0], tuple(args[1])
    numel = prod(size)
    nbytes = numel * tensor.dtype.itemsize
    record = recorder.record_of(tensor)
    if tensor.device.type != "cpu" or (record is None and tensor.untyped_storage().nbytes() > 0):
        return None
    old_bytes = 0 if record is None else record.nbytes
    if nbytes <= old_bytes or numel == 0:
        return func(*args, **kwargs)  # type: ignore[no-any-return]
    grown, new = recorder.reserve(nbytes, tensor.dtype)
    if record is not None:
        recorder.force([record] if record.pending else [], func)
        kept = torch.frombuffer(record.memory(), dtype=torch.uint8)
        torch.frombuffer(new.memory(), dtype=torch.uint8)[:old_bytes].copy_(kept)
    memory_format = kwargs.get("memory_format")
    shaped = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    tensor.set_(grown.untyped_storage(), 0, size, shaped.stride())
    return tensor  # type: ignore[no-any-return]
