"""Reading one tensor's bytes, after a look whether the file is still the one whose header was read."""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from weightlift import dtypes
from weightlift.ambient import outside_modes
from weightlift.checkpoint.entry import ShardFile, TensorEntry
from weightlift.checkpoint.files import opened, short_read
from weightlift.errors import CheckpointChanged, CheckpointError, Problem
from weightlift.strides import row_major


def difference(file: ShardFile, status: os.stat_result) -> Problem | None:
    """What tells that ``status`` is not that of the file whose header was read; None if nothing does."""
    compared = (
        ("size in bytes", file.size_bytes, status.st_size),
        ("modification time in ns", file.mtime_ns, status.st_mtime_ns),
        ("device and inode", (file.device, file.inode), (status.st_dev, status.st_ino)),
    )
    changed = [(name, was, now) for name, was, now in compared if was != now]
    if not changed:
        return None
    return Problem(
        "the file changed since the checkpoint was opened",
        file=file.path,
        expected=", ".join(f"{name} {was}" for name, was, _ in changed),
        found=", ".join(str(now) for _, _, now in changed),
        hint="open the checkpoint again",
    )


def require_unchanged(file: ShardFile, status: os.stat_result) -> None:
    """Raise `CheckpointChanged` unless ``status`` is that of the file whose header was read."""
    problem = difference(file, status)
    if problem is not None:
        raise CheckpointChanged("the checkpoint changed since it was opened", [problem])


def read_whole(files: Mapping[Path, ShardFile], entry: TensorEntry) -> torch.Tensor:
    """`read_tensor` of an entry that may have chunks, each of which is read by itself. ``files``: by their paths."""
    if not entry.chunks:
        assert entry.file is not None
        return read_tensor(files[entry.file], entry)
    with outside_modes():
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        carrier = dtypes.carrier(entry.dtype.itemsize)
        for offsets, chunk in entry.chunks:
            box = tensor.view(carrier)
            for dim, (offset, size) in enumerate(zip(offsets, chunk.shape, strict=True)):
                box = box.narrow(dim, offset, size)
            assert chunk.file is not None
            box.copy_(read_tensor(files[chunk.file], chunk).view(carrier))
    return tensor


def read_tensor(file: ShardFile, entry: TensorEntry) -> torch.Tensor:
    """A row-major CPU tensor with memory of its own, read from the entry's byte range.

    Torch modes of the calling thread (fake tensors, deferred construction, a device context) do not apply to it.
    Raises `CheckpointChanged` when the file is another one, `CheckpointError` with file and range on short reads and
    on what the operating system refuses. Thread-safe: each call has its own descriptor.
    """
    size = entry.end - entry.start
    with outside_modes():
        with opened(file.path) as (stream, status):
            require_unchanged(file, status)
            storage = torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
            _fill(storage, stream, file, entry)
            # Written to while it was being read? Then these bytes belong to neither version.
            require_unchanged(file, os.fstat(stream.fileno()))
        return _tensor(storage, entry)


def _fill(storage: torch.UntypedStorage, stream: io.FileIO, file: ShardFile, entry: TensorEntry) -> None:
    size = entry.end - entry.start
    if not size:
        return
    # A view of the storage's memory that needs neither numpy nor a torch call; it doesn't outlive this function.
    view = memoryview((ctypes.c_ubyte * size).from_address(storage.data_ptr())).cast("B")
    stream.seek(entry.start)
    done = 0
    while done < size:
        try:
            count = stream.readinto(view[done:])
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            problem = Problem(what, key=entry.key, file=file.path, start=entry.start, end=entry.end)
            raise CheckpointError("cannot read the checkpoint", [problem]) from error
        if not count:
            raise short_read(file.path, entry.start, entry.end, done, entry.key)
        done += count


def _tensor(storage: torch.UntypedStorage, entry: TensorEntry) -> torch.Tensor:
    # Copies go through a dtype of the same width, as not every dtype has kernels of its own.
    carrier = torch.empty(0, dtype=dtypes.carrier(entry.dtype.itemsize), device="cpu")
    stride = entry.stride if entry.stride is not None else row_major(entry.shape)
    tensor = carrier.set_(storage, 0, entry.shape, stride)
    if entry.stride is not None:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return torch.empty(0, dtype=entry.dtype, device="cpu").set_(
        tensor.untyped_storage(), 0, entry.shape, row_major(entry.shape)
    )
