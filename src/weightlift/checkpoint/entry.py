"""The frozen records that every format is read into: where each tensor lies, and in which file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch

Format = Literal["safetensors", "torch", "torch-legacy", "dduf", "dcp"]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file of a checkpoint, with the identity it had when its header was read.

    ``size_bytes``, ``mtime_ns``, ``inode`` and ``device`` let the transfer refuse a file that changed since.
    """

    path: Path
    format: Format
    size_bytes: int
    mtime_ns: int
    inode: int
    device: int
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __reduce__(self) -> tuple[object, ...]:
        # A proxy can't be pickled.
        values = self.path, self.format, self.size_bytes, self.mtime_ns, self.inode, self.device
        return _shard_file, (*values, dict(self.metadata))


def _shard_file(
    path: Path, kind: Format, size_bytes: int, mtime_ns: int, inode: int, device: int, metadata: dict[str, str]
) -> ShardFile:
    return ShardFile(path, kind, size_bytes, mtime_ns, inode, device, MappingProxyType(metadata))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor of a checkpoint lies.

    ``start`` and ``end`` are the half-open byte range in ``file``; for a tensor given in memory ``file`` is None and
    the range is ``0:nbytes``. ``stride`` (in elements) is None when the bytes are contiguous in row-major order, as
    they always are in safetensors; a pickled view keeps its own.

    One that was written in several boxes, as torch.distributed.checkpoint does it, has these in ``chunks``, which fill
    it without overlap and without a hole; its own ``file`` is None then, and the range ``0:nbytes``.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None
    start: int
    end: int
    stride: tuple[int, ...] | None = None
    chunks: tuple[Chunk, ...] = ()

    @property
    def pieces(self) -> tuple[TensorEntry, ...]:
        """What lies in one run of bytes each: the chunks, or the tensor itself."""
        return tuple(chunk.entry for chunk in self.chunks) if self.chunks else (self,)

    @property
    def numel(self) -> int:
        """Elements, as ``torch.Tensor.numel``."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor's elements take once read, strides aside."""
        return self.numel * self.dtype.itemsize


class Chunk(NamedTuple):
    """The box of a tensor that begins at ``offsets`` and has the shape of ``entry``, which says where it lies."""

    offsets: tuple[int, ...]
    entry: TensorEntry


def nbytes_of(entry: TensorEntry) -> int:
    """`TensorEntry.nbytes`, without its product where the range says the same."""
    return entry.end - entry.start if entry.stride is None else entry.nbytes


@dataclass(frozen=True, slots=True)
class ShardContents:
    """What the header of one file says.

    ``extras`` are the values of a pickled state dict that are not tensors, by their key; a tensor nested in one stands
    there as its `TensorEntry`. ``state_dict_metadata`` is the ``_metadata`` of a pickled state dict (module versions).
    """

    file: ShardFile
    entries: tuple[TensorEntry, ...]
    extras: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    state_dict_metadata: Mapping[str, Mapping[str, object]] | None = None
