"""The format of ``torch.save`` before its zip (``_use_new_zipfile_serialization=False``).

Five pickles (magic number, protocol, system, the object, the keys of its storages), then for each storage in that
order its number of elements (8 bytes, little-endian) and its bytes, little-endian on every machine. The pickles are
read, the storages are only walked over.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from weightlift.checkpoint.entry import ShardContents
from weightlift.checkpoint.files import opened, read_exactly, shard_file
from weightlift.checkpoint.part import WHOLE, Part
from weightlift.checkpoint.torch_globals import StorageRef, is_integer
from weightlift.checkpoint.torch_pickle import PickleReader
from weightlift.checkpoint.torch_state import SUMMARY, StateDict, reader_for, unpickle, versions
from weightlift.errors import CheckpointError, Problem

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_LINE = 4096


class _Bounded(io.RawIOBase):
    """A buffered stream for genops that never allocates more than the file still has."""

    def __init__(self, stream: io.FileIO, size: int) -> None:
        super().__init__()
        self._stream = io.BufferedReader(stream)
        self._size = size

    def read(self, count: int = -1) -> bytes:
        if 0 <= count <= _MAX_LINE:  # nearly all of them, and little to allocate
            return self._stream.read(count)
        left = self._size - self._stream.tell()
        return self._stream.read(left if count < 0 else min(count, left))

    def readline(self, limit: int | None = -1, /) -> bytes:
        return self._stream.readline(_MAX_LINE)

    def tell(self) -> int:
        return self._stream.tell()

    def back_to(self, position: int) -> _Bounded:
        """This stream, from there again."""
        self._stream.seek(position)
        return self

    def release(self) -> None:
        """Let go of the file without closing it: its owner does."""
        self._stream.detach()


def read_torch_legacy(path: Path, part: Part = WHOLE) -> ShardContents:
    """The records of a legacy file, in the order of its state dict. Takes and raises what `read_torch_zip` does."""
    with opened(path) as (stream, status):
        bounded = _Bounded(stream, status.st_size)
        reader = reader_for(part)
        try:
            _require(path, "the magic number", unpickle(PickleReader(), bounded, path), _MAGIC)
            _require(path, "the protocol version", unpickle(PickleReader(), bounded, path), _PROTOCOL)
            system = unpickle(PickleReader(), bounded, path)  # byte order and sizes of the writer: no longer used
            if not isinstance(system, dict):
                raise CheckpointError(SUMMARY, [Problem("its notes on the writer are not a mapping", file=path)])
            begin = bounded.tell()
            again = None if part.names else partial(bounded.back_to, begin)
            whole = unpickle(reader, bounded, path, again)
            keys = unpickle(PickleReader(), bounded, path)
            position = bounded.tell()
        finally:
            bounded.release()
        places = _Places(path, reader.storages)
        places.walk(stream, keys, position, status.st_size)
        state = StateDict(path, places.place, reader, part)
        root = state.convert(whole)
        attributes = reader.attributes(root)
        return ShardContents(
            shard_file(path, "torch-legacy", status), tuple(state.entries), state.extras, versions(attributes)
        )


def _require(path: Path, what: str, found: Any, expected: int) -> None:
    if found != expected:
        shown = str(found) if type(found) is int and abs(found) < 2**128 else f"a {type(found).__name__}"
        problem = Problem(
            f"{what} is wrong",
            file=path,
            expected=str(expected),
            found=shown,
            hint="a pickle, but not one that torch.save wrote",
        )
        raise CheckpointError(SUMMARY, [problem])


class _Places:
    """Where the storages lie."""

    def __init__(self, path: Path, storages: dict[str, StorageRef]) -> None:
        self.path = path
        self.storages = storages
        self.found: dict[str, tuple[int, int]] = {}

    def walk(self, stream: io.FileIO, keys: Any, position: int, size: int) -> None:
        """Note the range of each storage, or raise `CheckpointError` where the walk cannot go on."""
        if type(keys) is not list or not all(type(key) is str or is_integer(key) for key in keys):
            self._fail("the list of storages is damaged")
        for key in map(str, keys):
            storage = self.storages.get(key)
            if storage is None:
                # Without its dtype its length in bytes is unknown, and so is where the next one begins.
                self._fail(f"the storage {key} is in the file, but not in the pickle")
            if position + 8 > size:
                self._truncated(key, position, position + 8, size)
            numel = int.from_bytes(read_exactly(stream, self.path, position, 8), "little", signed=True)
            if numel != storage.numel:
                self._fail(
                    f"the storage {key} is not of its size",
                    start=position,
                    end=position + 8,
                    expected=f"{storage.numel} elements",
                    found=f"{numel}",
                )
            start = position + 8
            position = start + numel * storage.dtype.itemsize
            if position > size:
                self._truncated(key, start, position, size)
            self.found[key] = (start, position)

    def place(self, storage: StorageRef) -> tuple[int, int] | Problem:
        """The byte range of a storage."""
        return self.found.get(storage.key) or Problem(f"the storage {storage.key} is missing", file=self.path)

    def _truncated(self, key: str, start: int, end: int, size: int) -> NoReturn:
        self._fail(
            f"is truncated in the storage {key}",
            start=start,
            end=end,
            expected=f"a file of {end} bytes or more",
            found=f"{size} bytes",
            hint="is the download complete?",
        )

    def _fail(self, what: str, **more: Any) -> NoReturn:
        raise CheckpointError(SUMMARY, [Problem(what, file=self.path, **more)])
