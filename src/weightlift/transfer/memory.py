"""Memory: file mappings, destinations on huge pages, and reusable staging blocks.

Everything here hands out ordinary CPU tensors on memory that goes back to the system when the last of them dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from weightlift import dtypes, pages
from weightlift.checkpoint.entry import TensorEntry
from weightlift.errors import Problem, TransferError
from weightlift.strides import row_major
from weightlift.transfer.reuse import take

_HUGE_FROM_BYTES = 2 << 20

# Dtypes that ATen copies; the others (fp4, sub-byte integers) travel as integers of the same size.
_COPYABLE = frozenset({
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
})  # fmt: skip


def carrier(dtype: torch.dtype) -> torch.dtype:
    """The dtype as which a tensor is copied unconverted: itself, or an integer of its size where torch has no copy."""
    return dtype if dtype in _COPYABLE else dtypes.carrier(dtype.itemsize)


def bits(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype of the same size (complex128 for 16 bytes), to compare bits by."""
    return dtypes.carrier(dtype.itemsize)


# Every mapping that lives. Written one entry at a time, also by the collector, and read as a copy: no lock is needed.
_mapped: dict[int, tuple[int, int, Path]] = {}
_numbers = itertools.count()


def mappings() -> tuple[tuple[int, int, Path], ...]:
    """The file mappings that live now: address, size in bytes, and file."""
    return tuple(_mapped.copy().values())


class FileMapping:
    """A private, writable (copy-on-write) mapping of a whole file, that holds no descriptor.

    ``buffer`` keeps the mapping alive; tensors made from it by ``torch.frombuffer`` do as well. Raises OSError.
    """

    def __init__(self, fd: int, size_bytes: int, path: Path) -> None:
        _read_in_order(fd)
        self.buffer = _map(fd, size_bytes)
        address = _address(self.buffer)
        # A counter and not the address: another mapping may lie there before this one's entry is gone.
        key = next(_numbers)
        _mapped[key] = address, size_bytes, path
        weakref.finalize(self.buffer, _mapped.pop, key, None).atexit = False

    def tensor(
        self, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...] | None, start: int, elements: int
    ) -> torch.Tensor:
        """A tensor on the mapping from byte ``start`` on, ``elements`` (> 0) from its first to its last element."""
        flat = torch.frombuffer(self.buffer, dtype=dtype, count=elements, offset=start)
        if stride is not None:
            return flat.as_strided(shape, stride)
        return flat if len(shape) == 1 else flat.view(shape)


def _map(fd: int, size_bytes: int) -> mmap.mmap | ctypes.Array[ctypes.c_char]:
    # Python's mmap keeps a duplicate of the descriptor for the mapping's life, and counts a file that is larger than
    # the memory as more than the system could commit. On Linux the call itself does neither.
    if not pages.AVAILABLE:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    flags = pages.MAP_PRIVATE | pages.MAP_NORESERVE
    return pages.owned(pages.map_pages(size_bytes, access=pages.READ_WRITE, flags=flags, fd=fd), size_bytes)


def _read_in_order(fd: int) -> None:
    """Have the system read further ahead than it does for accesses it can't foresee: twice as far, by whole windows."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # it is a hint, which not every file system takes
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous, uninitialised CPU tensor; big ones on huge pages where the system has them (`take`)."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes >= _HUGE_FROM_BYTES:
        memory = take(nbytes)
        if memory is not None:
            return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(tuple(shape))
    return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def new_memory(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, fqn: str | None = None, key: str | None = None
) -> torch.Tensor:
    """Uninitialised and contiguous, on any device; on the CPU as `new_tensor`. Raises TransferError where there is no
    more memory; ``fqn`` and ``key`` are for its message."""
    try:
        return new_tensor(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        problem = Problem(f"no memory for a tensor of shape {list(shape)}: {error}", fqn=fqn, key=key)
        raise TransferError("loading failed", [problem]) from error


def _address(block: mmap.mmap | ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


def alias(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same memory and geometry under a dtype of equal size: no autograd, no inference flag, no version counter."""
    if dtype == tensor.dtype and not tensor.is_inference():
        return tensor.data
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=dtype, device=tensor.device)
    return flat.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def in_memory(entry: TensorEntry, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The elements of a tensor in memory that ``entry`` describes, as ordinary strided memory and without autograd: the
    tensor's own memory, but for rare kinds of tensors."""
    tensor = tensors[entry.key].detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    stride = row_major(entry.shape) if entry.stride is None else entry.stride
    start = tensor.storage_offset() + entry.start // entry.dtype.itemsize
    if (entry.shape, stride, entry.start) != (tuple(tensor.shape), tensor.stride(), 0):
        tensor = tensor.as_strided(entry.shape, stride, start)
    return tensor.resolve_conj().resolve_neg()


def bytes_of_values(tensor: torch.Tensor) -> memoryview:
    """A tensor's values, row-major, wherever and however it lies. A copy, but for what lies so on the CPU."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def memory_of(tensor: torch.Tensor, at: int, nbytes: int) -> memoryview:
    """Bytes of a contiguous CPU tensor, from its byte ``at`` on. The caller keeps the tensor alive."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr() + at)).cast("B")


class Mark(Protocol):
    """A place in the order of what a device was asked to do, as torch's events are."""

    def query(self) -> bool:
        """Whether the device has come to it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...


class Staging:
    """One reusable block of bytes, used by one thread at a time. ``ready``: when its last copy has left it."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat
        self.view = memory_of(flat, 0, flat.numel())
        self.ready: Mark | None = None
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    def strided(self, dtype: torch.dtype, at: int, sizes: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        """A view of ``sizes`` from byte ``at`` on; a copy where that byte is not aligned to the dtype."""
        itemsize = dtype.itemsize
        if at % itemsize:
            span = 1 + sum((size - 1) * step for size, step in zip(sizes, stride, strict=True))
            moved = self.flat[at : at + span * itemsize].clone()
            return moved.view(dtype).as_strided(sizes, stride)
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = self.flat.view(dtype)
        return typed.as_strided(sizes, stride, typed.storage_offset() + at // itemsize)


class StagingPool:
    """Lends staging blocks, the one used last first, so that it is still in the cache; never more than ``count``.

    Safe to use from several threads. ``count`` is at least what all threads hold at once:
    `take` never waits for another thread, only for a device.
    """

    def __init__(self, block_bytes: int, count: int, allocate: Callable[[int], torch.Tensor] | None = None) -> None:
        self.block_bytes = -(-block_bytes // dtypes.LARGEST_ELEMENT_BYTES) * dtypes.LARGEST_ELEMENT_BYTES
        self._allocate = allocate or (lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device="cpu"))
        self._left = count
        self._free: list[Staging] = []
        self._lock = threading.Lock()

    def take(self) -> Staging:
        """A block that nothing reads from any more; the caller's until `give`."""
        with self._lock:
            for at in range(len(self._free) - 1, -1, -1):
                if self._free[at].ready is None:
                    return self._free.pop(at)
            # Copies end in their order: where the oldest one's has not, none has. Then a new block is made while there
            # may be one more, and after that it is waited for.
            oldest = self._free[0].ready if self._free else None
            block = self._free.pop(0) if self._left == 0 or (oldest is not None and oldest.query()) else None
            if block is None:
                self._left -= 1
        if block is None:
            return Staging(self._allocate(self.block_bytes))
        if block.ready is not None:
            block.ready.synchronize()
            block.ready = None
        return block

    def give(self, block: Staging) -> None:
        """Hand a block back."""
        with self._lock:
            self._free.append(block)
