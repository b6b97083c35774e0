"""``.metadata`` of torch.distributed.checkpoint: which boxes of which tensor lie where in the files beside it.

A pickle of torch's own records, which torch unpickles by running whatever it names. Here nothing is run: a `Record`
stands for each of them, and what else a planner or a storage writer has left there is passed over.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightlift.checkpoint.files import opened, read_exactly
from weightlift.checkpoint.torch_globals import BrokenPickleError, Opaque, is_integer
from weightlift.checkpoint.torch_lenient import LenientReader
from weightlift.errors import CheckpointError, Problem

NAME = ".metadata"
"""The file's name."""

SUFFIX = ".distcp"
"""That of the files that hold the values."""

SUMMARY = "not a valid distributed checkpoint"
MAX_BYTES = 1_000_000_000
"""A longer one is refused."""

UNFLATTENED = (
    "a planner with flatten_state_dict=False makes one value of a mapping, with no more than one rank's parts of its "
    "tensors: save it without that"
)
"""What to do where a mapping is expected and a value is found."""

_SHOWN = 8
_MAX_DIMS = 100  # of a tensor
_MODULES = "torch.distributed."
_RECORDS = frozenset(
    {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "_StorageInfo", "StorageMeta", "_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """One object that torch.save wrote: the bytes ``start:end`` of the file of that name. Of a tensor it is the box of
    ``sizes`` that begins at ``offsets``; of any other value it is all."""

    file: str
    start: int
    end: int
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """One value: a tensor of ``shape`` and ``dtype``, or anything else where these are None.

    ``path`` leads to it in what was saved, by keys and by places in lists; ``key`` is its name in the file.
    """

    key: str
    path: tuple[Any, ...]
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether it lies in boxes."""
        return self.shape is not None


def read_metadata(path: Path) -> tuple[Item, ...]:
    """The values of a checkpoint, in the order in which they were saved. Raises `CheckpointError` with every problem,
    `CheckpointNotFound` when there is no such file."""
    with opened(path) as (stream, status):
        if status.st_size > MAX_BYTES:
            expected, found = f"at most {MAX_BYTES} bytes", f"{status.st_size} bytes"
            raise CheckpointError(SUMMARY, [Problem("is too long", file=path, expected=expected, found=found)])
        raw = read_exactly(stream, path, 0, status.st_size)
    try:
        return tuple(_items(_Reader().read(io.BytesIO(raw)), path))
    except BrokenPickleError as error:
        hint = "is the copy complete?"
        problem = Problem("is damaged, or no metadata of it", file=path, found=str(error), hint=hint)
        raise CheckpointError(SUMMARY, [problem]) from None


class _Record:
    """An object of one of torch's classes."""

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = {}

    def get(self, field: str) -> Any:
        """A field of it; None where it has none."""
        return self.state.get(field) if isinstance(self.state, dict) else None


@dataclass(frozen=True, slots=True)
class _Class:
    name: str


class _Reader(LenientReader):
    """Makes a `_Record` of what is of torch's classes, and passes over code as its base does."""

    def _find(self, module: str, name: str) -> Any:
        return _Class(name) if name in _RECORDS and module.startswith(_MODULES) else super()._find(module, name)

    def _reduced(self, function: Any, args: Any) -> Any:
        return _Record(function.name) if isinstance(function, _Class) else super()._reduced(function, args)

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, _Record):
            target.state = state
        else:
            super()._set_state(target, state)

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        others: list[Any] = []
        for key, value in zip(pairs[::2], pairs[1::2]):
            if type(key) is _Record and type(target) is dict:
                target[key] = value  # by identity: what it says is compared later
            else:
                others += key, value
        if others or not pairs:
            super()._set_items(others)


def _items(root: Any, path: Path) -> Iterator[Item]:
    metadata = root if isinstance(root, _Record) and root.name == "Metadata" else _Record("Metadata")
    described, stored = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise BrokenPickleError("it is no Metadata that a FileSystemWriter has written")
    paths = metadata.get("planner_data")
    paths = paths if isinstance(paths, dict) else {}
    places = {_index(key): value for key, value in stored.items()}
    problems: list[Problem] = []
    boxes: dict[int, _Boxes] = {}
    items = []
    for key, value in described.items():
        if type(key) is not str or not isinstance(value, _Record):
            raise BrokenPickleError("a value without a name or a description")
        found = _pieces(key, value, places, path, boxes)
        problems += [piece for piece in found if isinstance(piece, Problem)]
        pieces = tuple(piece for piece in found if isinstance(piece, Piece))
        where = paths.get(key)
        where = where if type(where) is tuple and where else (key,)
        shape = _sizes(value.get("size")) if value.name == "TensorStorageMetadata" else None
        items.append(Item(key, where, pieces, shape, None if shape is None else _dtype(value)))
    if problems:
        raise CheckpointError(SUMMARY, problems)
    return iter(items)


_Index = tuple[Any, "tuple[int, ...] | None"]
_Boxes = dict["tuple[int, ...]", "tuple[int, ...]"]  # sizes, by offsets


def _index(key: Any) -> _Index:
    if not isinstance(key, _Record) or key.name != "MetadataIndex" or type(key.get("fqn")) is not str:
        raise BrokenPickleError("a place of nothing that has a name")
    offset = key.get("offset")
    return key.get("fqn"), None if offset is None else _sizes(offset)


def _pieces(
    key: str, value: _Record, places: Mapping[_Index, Any], path: Path, known: dict[int, _Boxes]
) -> list[Piece | Problem]:
    """Where the boxes of a value lie, up to the first that lies nowhere: a list that many values share is looked at
    once, and for each of them no further than it has places."""
    if value.name == "BytesStorageMetadata":
        return [_piece(key, (key, None), places, path)]
    chunks = value.get("chunks")
    if value.name != "TensorStorageMetadata" or type(chunks) is not list:
        raise BrokenPickleError(f"a description of {key:.100} that is none of a tensor")
    boxes = known.setdefault(id(chunks), {})  # of ranks that hold the same, one
    for chunk in chunks if not boxes else ():
        if not isinstance(chunk, _Record):
            raise BrokenPickleError(f"a part of {key:.100} that is not described")
        boxes[_sizes(chunk.get("offsets"))] = _sizes(chunk.get("sizes"))
    found = list[Piece | Problem]()
    for offsets, sizes in boxes.items():
        found.append(_piece(key, (key, offsets), places, path, sizes))
        if isinstance(found[-1], Problem):
            break
    return found


def _piece(
    key: str, index: _Index, places: Mapping[_Index, Any], path: Path, sizes: tuple[int, ...] = ()
) -> Piece | Problem:
    stored = places.get(index)
    if stored is None:
        where = "" if index[1] is None else f" at {list(index[1])}"
        return Problem(f"no file holds it{where}", key=key, file=path, hint="is the checkpoint complete?")
    if not isinstance(stored, _Record) or stored.name != "_StorageInfo":
        raise BrokenPickleError(f"a place of {key:.100} that is in no file of a FileSystemWriter")
    file, start, length = (stored.get(field) for field in ("relative_path", "offset", "length"))
    if type(file) is not str or not is_integer(start) or not is_integer(length) or start < 0 or length < 0:
        raise BrokenPickleError(f"a place of {key:.100} that is no range of a file")
    if packed := stored.get("transform_descriptors"):
        names = [name[:40] for name in packed[:_SHOWN] if type(name) is str] if type(packed) in (list, tuple) else []
        what = f"is written with the extension {', '.join(names) or 'of no name'}"
        hint = "save it without extensions of the storage writer"
        return Problem(what, key=key, file=path, expected="as torch.save writes it", hint=hint)
    return Piece(file, start, start + length, index[1] or (), sizes)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMS:
        raise BrokenPickleError(f"a shape or an offset that is none of {_MAX_DIMS} dimensions at most")
    if not all(is_integer(item) and item >= 0 for item in value):
        raise BrokenPickleError("a shape or an offset that is not integers")
    return tuple(value)


def _dtype(value: _Record) -> torch.dtype:
    properties = value.get("properties")
    state = properties.state if isinstance(properties, _Record) else None
    dtype = state.get("dtype") if isinstance(state, dict) else state[0] if type(state) is tuple and state else None
    if not isinstance(dtype, torch.dtype):
        found = dtype.what if isinstance(dtype, Opaque) else type(dtype).__name__
        raise BrokenPickleError(f"a tensor whose dtype is {found}")
    return dtype
