"""Real safetensors files, their entries, and sources that fail on purpose."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file

from weightlift.checkpoint.entry import ShardFile, TensorEntry
from weightlift.options import DEFAULT_BUDGET_BYTES, LoadOptions
from weightlift.transfer.accelerator import backend_for
from weightlift.transfer.engine import run
from weightlift.transfer.jobs import Job
from weightlift.transfer.sources import FileHandle, FileSource
from weightlift.transfer.subject import Bytes

CPU = torch.device("cpu")
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def random_bits(shape, dtype, seed=0):
    """A tensor of any dtype; floats hold NaNs and infinities as well."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    n = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor):
    """A tensor's bytes in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def shard(path: Path) -> ShardFile:
    stat = os.stat(path)
    return ShardFile(path, "safetensors", stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev)


def entries_of(path: Path) -> dict[str, TensorEntry]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        key: TensorEntry(key, tuple(h["shape"]), DTYPES[h["dtype"]], path, *(base + x for x in h["data_offsets"]))
        for key, h in header.items()
    }


class Saved:
    """A saved file with its entries, and `load` with short defaults."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        save_file(tensors, path)
        self.path, self.shard, self.entries = path, shard(path), entries_of(path)

    def jobs(self, dtype=None, into=None):
        into = into or {}
        return [Job(f"model.{k}", e, dtype or e.dtype, CPU, into.get(k)) for k, e in self.entries.items()]

    def load(self, jobs=None, tasks=(), **options):
        jobs = self.jobs() if jobs is None else jobs
        values = load(jobs, tasks, files=[self.shard], **options)
        return dict(zip((job.entry.key for job in jobs), values, strict=True))


def load(jobs, tasks=(), *, files=(), tensors=None, source=None, backend=backend_for, **options):
    given = Bytes(files, tensors or {}, {})
    return run(jobs, tasks, source=given, options=made_options(**options), store=source, backend=backend)


def made_options(*, memory_budget_bytes=None, **options):
    """Options unchecked: a budget may be as small as none."""
    budget = DEFAULT_BUDGET_BYTES if memory_budget_bytes is None else memory_budget_bytes
    return LoadOptions(**{"workers": 2, "progress": False, "memory_budget_bytes": budget} | options)


class FaultySource(FileSource):
    """``fault(buffer, offset)`` runs before every read; it may raise, wait, or return a number to be the answer.

    Keeps the address ranges of all buffers that were ever lent to a read.
    """

    def __init__(self, fault=lambda buffer, offset: None) -> None:
        self.fault = fault
        self.reads: list[tuple[int, int]] = []
        self.buffers: set[tuple[int, int]] = set()
        self.open_handles = 0
        self.lock = threading.Lock()

    def open(self, file):
        source = self

        class Handle(FileHandle):
            def readinto(self, buffer, offset):
                with source.lock:
                    source.reads.append((offset, len(buffer)))
                    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
                    source.buffers.add((address, len(buffer)))
                answer = source.fault(buffer, offset)
                return super().readinto(buffer, offset) if answer is None else answer

            def readinto_cached(self, buffer, offset):
                return 0

            def close(self):
                if self._fd >= 0:
                    source.open_handles -= 1
                super().close()

        self.open_handles += 1
        return Handle(file)


def union_bytes(ranges) -> int:
    """Bytes covered by address ranges ``(start, length)``."""
    total, reached = 0, 0
    for start, length in sorted(ranges):
        total += max(0, start + length - max(reached, start))
        reached = max(reached, start + length)
    return total
