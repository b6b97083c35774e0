"""The folders that torch.distributed.checkpoint writes: a ``.metadata``, and files of what each rank had.

A tensor lies there in the boxes that its ranks held, each as an archive of torch.save amid a ``.distcp`` file. Their
directories and pickles are read, which tell where the elements are; elements are not. A load takes them from there to
wherever they belong, whatever the number of ranks was that wrote them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

from weightlift.checkpoint.dcp_metadata import SUMMARY, UNFLATTENED, Item, Piece, read_metadata
from weightlift.checkpoint.entry import Chunk, ShardContents, ShardFile, TensorEntry
from weightlift.checkpoint.files import opened, shard_file
from weightlift.checkpoint.index import member
from weightlift.checkpoint.part import WHOLE, Part, told
from weightlift.checkpoint.stored_zip import Window, damage_told
from weightlift.checkpoint.torch_globals import Opaque, TensorRef, is_integer
from weightlift.checkpoint.torch_lenient import LenientReader
from weightlift.checkpoint.torch_pickle import PickleReader
from weightlift.checkpoint.torch_state import StateDict, flat_problem, unpickle
from weightlift.checkpoint.torch_zip import Likeness, TorchArchive
from weightlift.errors import CheckpointError, Problem

_MAX_DEPTH = 100  # of what is nested
_MAX_CORNERS = 2**22  # of all boxes of one tensor
_COUNTS = 2**60
_SHOWN = 8


def file_names(path: Path) -> list[str]:
    """The names of the files that a ``.metadata`` needs. Raises what `read_metadata` raises."""
    return sorted({piece.file for item in read_metadata(path) for piece in item.pieces})


def read_dcp(path: Path, part: Part = WHOLE) -> tuple[ShardContents, ...]:
    """The files beside a ``.metadata``, each with what lies in it alone, the first also with what lies in several:
    the state dict that is ``part`` of what was saved.

    Raises `CheckpointError` with every problem (files that are missing, cut or outside of the folder, boxes that leave
    a hole, values that only code can make), `CheckpointNotFound` when there is no ``.metadata``.
    """
    root = part.find(_nested(read_metadata(path), path), path)
    problem = flat_problem(root, path, _is_tensor, part)
    if problem is not None:
        if root and all(isinstance(value, Item) and not value.is_tensor for value in root.values()):
            problem = replace(problem, hint=UNFLATTENED)
        raise CheckpointError(SUMMARY, [problem])
    folder = _Folder(path)
    folder.look(_items_in(root.values()))
    entries = [folder.entry(key, value) for key, value in root.items() if _is_tensor(value)]
    extras = {key: folder.value(key, value) for key, value in root.items() if not _is_tensor(value)}
    if folder.problems:
        raise CheckpointError(SUMMARY, folder.problems)
    return folder.contents([entry for entry in entries if entry is not None], extras)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Item) and value.is_tensor


class _List:
    """A list while its items come in any order."""

    def __init__(self) -> None:
        self.held: dict[Any, Any] = {}


def _nested(items: Iterable[Item], path: Path) -> dict[str, Any]:
    """What was saved, as it was before each of its values got a name of its own."""
    root: dict[Any, Any] = {}
    problems = []
    for item in items:
        steps = item.path[: _MAX_DEPTH + 1]  # many may share one that is very long
        is_place = len(steps) <= _MAX_DEPTH and all(type(step) is str or is_integer(step) for step in steps)
        within: dict[Any, Any] | None = root if is_place else None
        for step, after in pairwise(steps):
            if within is not None:
                within = _held_by(within.setdefault(step, _List() if type(after) is int else {}))
        if within is None or item.path[-1] in within:
            found = ", ".join(map(_step, steps[:_SHOWN]))
            problems.append(Problem("its place among the others is no place", key=item.key, file=path, found=found))
        else:
            within[item.path[-1]] = item
    if problems:
        raise CheckpointError(SUMMARY, problems)
    return root


def _step(step: Any) -> str:
    """A step of a path, for an error: whatever a pickle may have there."""
    return repr(step[:40]) if type(step) is str else str(step) if is_integer(step) else told(step)


def _held_by(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key or place; None for one that is none."""
    held: dict[Any, Any] | None = value.held if isinstance(value, _List) else None
    return value if isinstance(value, dict) else held


def _items_in(values: Iterable[Any]) -> list[Item]:
    found = []
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Item):
            found.append(value)
        else:
            waiting += (_held_by(value) or {}).values()
    return found


class _Folder:
    """The pieces of the files beside one ``.metadata``. Collects problems."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, ShardFile] = {}
        self._found: dict[Piece, Any] = {}
        self._refs: dict[bytes, TensorRef] = {}
        self._alike: dict[Any, Likeness] = {}
        self.problems: list[Problem] = []

    def look(self, items: Iterable[Item]) -> None:
        """Find out what lies at the pieces of the items: in order, and each file is opened once."""
        by_file: dict[str, list[tuple[Item, Piece]]] = {}
        for item in items:
            for piece in item.pieces:
                by_file.setdefault(piece.file, []).append((item, piece))
        for name, wanted in sorted(by_file.items()):
            where = member(self._path, name)
            if isinstance(where, Problem):
                self.problems.append(where)
                continue
            try:
                self._look_into(name, where, sorted(wanted, key=lambda pair: pair[1].start))
            except CheckpointError as error:
                self.problems += error.problems

    def _look_into(self, name: str, path: Path, wanted: list[tuple[Item, Piece]]) -> None:
        with opened(path) as (stream, status):
            self._files[name] = shard_file(path, "dcp", status)
            behind = 0
            for item, piece in wanted:
                if piece.end > status.st_size:
                    self.problems.append(_outside(item.key, path, piece, status.st_size))
                    continue
                if piece.start < behind:  # nobody writes that, and to read one archive for each of many takes long
                    what, expected = "lies where another value does", f"a start at {behind} or behind it"
                    self.problems.append(
                        Problem(what, key=item.key, file=path, start=piece.start, end=piece.end, expected=expected)
                    )
                    continue
                behind = piece.end
                try:
                    self._found[piece] = self._read(path, stream, item, piece)
                except CheckpointError as error:
                    self.problems += [_at(piece, item.key, problem) for problem in error.problems]

    def _read(self, path: Path, stream: io.FileIO, item: Item, piece: Piece) -> Any:
        """What an archive amid a file holds: the `TensorEntry` of its box, or another value."""
        size = piece.end - piece.start
        with damage_told(path, size, SUMMARY):
            window = Window(stream, path, piece.start, piece.end)
            kind = size, item.dtype, piece.sizes
            if kind in self._alike and (alike := self._alike[kind].of(window, item.key, path, piece.start)):
                return alike
            archive = TorchArchive(path, window, size, begin=piece.start)
        raw = archive.read("data.pkl")
        if not item.is_tensor:
            return _other(path, archive, item, raw)
        held = self._refs.get(raw)
        if held is None:
            held = unpickle(PickleReader(), io.BytesIO(raw), path)
            if isinstance(held, TensorRef):  # which tells the same of all layers
                self._refs[raw] = held
        found = StateDict(path, archive.place, PickleReader()).value(item.key, held)
        if not isinstance(found, TensorEntry) or (found.dtype, found.shape) != (item.dtype, piece.sizes):
            shown = f"{found.dtype}, {list(found.shape)}" if isinstance(found, TensorEntry) else type(found).__name__
            what, expected = "is not what its metadata says", f"{item.dtype}, {list(piece.sizes)}"
            problem = Problem(what, file=path, start=piece.start, end=piece.end, expected=expected, found=shown)
            raise CheckpointError(SUMMARY, [problem])
        self._alike[kind] = Likeness(archive, found, piece.start)
        return found

    def entry(self, key: str, item: Item) -> TensorEntry | None:
        """Where a tensor lies; None where that is a problem."""
        assert item.shape is not None and item.dtype is not None
        chunks = []
        for piece in item.pieces:
            found = self._found.get(piece)
            if isinstance(found, TensorEntry) and (0 not in piece.sizes or 0 in item.shape):
                chunks.append(Chunk(piece.offsets, replace(found, key=key)))
        if any(piece not in self._found for piece in item.pieces):
            return None
        if not tiles(item.shape, [(chunk.offsets, chunk.entry.shape) for chunk in chunks]):
            found = ", ".join(f"{list(c.entry.shape)} at {list(c.offsets)}" for c in chunks[:4])
            found = (found or "none") + (", …" if len(chunks) > 4 else "")
            what, expected = "its boxes do not make it up", f"boxes that fill {list(item.shape)}, each element once"
            self.problems.append(Problem(what, key=key, file=self._path, expected=expected, found=found))
            return None
        if len(chunks) == 1 or 0 in item.shape:
            return replace(chunks[0].entry, shape=item.shape)
        nbytes = prod(item.shape) * item.dtype.itemsize
        return TensorEntry(key, item.shape, item.dtype, None, 0, nbytes, None, tuple(chunks))

    def value(self, key: str, value: Any) -> Any:
        """A value that is no tensor, in which tensors are `TensorEntry` records."""
        if isinstance(value, Item):
            return self.entry(key, value) if _is_tensor(value) else self._found.get(value.pieces[0])
        made = {name: self.value(key, item) for name, item in (_held_by(value) or {}).items()}
        if isinstance(value, _List) and set(made) == set(range(len(made))):
            return [made[place] for place in range(len(made))]
        return made

    def contents(self, entries: list[TensorEntry], extras: Mapping[str, object]) -> tuple[ShardContents, ...]:
        """A record for each file; the values go with the first, in their order."""
        first, *others = (self._files[name] for name in sorted(self._files))
        return (ShardContents(first, tuple(entries), extras), *(ShardContents(file, ()) for file in others))


def _at(piece: Piece, key: str, problem: Problem) -> Problem:
    """A problem with a piece, and where that lies if it does not tell itself."""
    start, end = (piece.start, piece.end) if problem.start is None else (problem.start, problem.end)
    return replace(problem, key=key, start=start, end=end)


def _outside(key: str, path: Path, piece: Piece, size: int) -> Problem:
    return Problem(
        "lies beyond the end of the file",
        key=key,
        file=path,
        start=piece.start,
        end=piece.end,
        expected=f"{piece.end} bytes at least",
        found=f"{size} bytes",
        hint="is the copy complete?",
    )


def _other(path: Path, archive: TorchArchive, item: Item, raw: bytes) -> Any:
    """A value that is no tensor. Where it is none of a module's, it may be code, which is told and not run."""
    is_needed = any(str(step).endswith("_extra_state") for step in item.path)
    reader = PickleReader() if is_needed else LenientReader()
    held = unpickle(reader, io.BytesIO(raw), path)
    try:
        return StateDict(path, archive.place, reader).value(item.key, held)
    except CheckpointError as error:
        if is_needed:
            raise
        found = error.problems[0].found or error.problems[0].what
        return Opaque(f"a value that cannot be read: {found}")


def tiles(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes (offsets and sizes) fill a shape, each element once.

    They do if they have as many elements as it has, lie within it, and their corners, of which those that come in pairs
    cancel out, are its corners: then every element is covered an odd number of times, and so once.
    """
    if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in boxes):
        return False
    if 0 in shape:
        return bool(boxes) and all(0 in sizes for _, sizes in boxes)
    if sum(prod(sizes) for _, sizes in boxes) != prod(shape):
        return False
    if prod(shape) >= _COUNTS:
        return False
    whole = [dim for dim, size in enumerate(shape) if all(sizes[dim] == size for _, sizes in boxes)]
    dims = [dim for dim in range(len(shape)) if dim not in whole]
    if len(boxes) << len(dims) > _MAX_CORNERS:
        return False
    corners: set[tuple[int, ...]] = set()
    for offsets, sizes in boxes:
        if any(offsets[dim] for dim in whole) or any(offsets[dim] + sizes[dim] > shape[dim] for dim in dims):
            return False
        corners ^= set(product(*((offsets[dim], offsets[dim] + sizes[dim]) for dim in dims)))
    return corners == set(product(*((0, shape[dim]) for dim in dims))) if dims else len(boxes) == 1
