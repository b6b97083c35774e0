"""Safetensors files that the ranks of torch.distributed.checkpoint wrote, each its own (``HuggingFaceStorageWriter``).

There is no list of them: each tells in its metadata where the boxes of tensors that it holds begin. A tensor is as
large as its boxes reach.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from weightlift.checkpoint.dcp import tiles
from weightlift.checkpoint.entry import Chunk, ShardContents, TensorEntry
from weightlift.checkpoint.torch_globals import is_integer
from weightlift.errors import Problem

_INFO = "DCP_SHARDING_INFO"
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Joined:
    """The tensors that lie in boxes, by their keys, and what is wrong with others of them. ``boxes``: the ids of the
    entries that either are made of."""

    entries: dict[str, TensorEntry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    boxes: set[int] = field(default_factory=set)


def joined(contents: Iterable[ShardContents]) -> Joined:
    """The tensors of which some file says that it holds a box; not those that one file holds whole."""
    boxes: dict[str, list[Chunk]] = {}
    for item in contents:
        offsets = _offsets(item)
        for entry in item.entries:
            if entry.key in offsets:
                boxes.setdefault(entry.key, []).append(Chunk(offsets[entry.key], entry))
    made = Joined()
    for key, chunks in boxes.items():
        if len(chunks) == 1 and not any(chunks[0].offsets):
            continue
        made.boxes.update(id(chunk.entry) for chunk in chunks)
        found = _whole(key, chunks)
        if isinstance(found, Problem):
            made.problems.append(found)
        else:
            made.entries[key] = found
    return made


def _offsets(contents: ShardContents) -> dict[str, tuple[int, ...]]:
    """Where the boxes of a file begin; of a file that says it otherwise than torch does, nothing."""
    text = contents.file.metadata.get(_INFO)
    if text is None:
        return {}
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    found = {}
    for entry in contents.entries:
        item: Any = told.get(entry.key) if isinstance(told, dict) else None
        offsets = item.get("saved_offsets") if isinstance(item, dict) else None
        if not isinstance(offsets, list) or len(offsets) != len(entry.shape):
            return {}
        if not all(is_integer(offset) and offset >= 0 for offset in offsets):
            return {}
        found[entry.key] = tuple(offsets)
    return found


def _whole(key: str, chunks: list[Chunk]) -> TensorEntry | Problem:
    first = chunks[0].entry
    shape = tuple(max(ends) for ends in zip(*(_end(chunk) for chunk in chunks)))
    filled = [chunk for chunk in chunks if 0 not in chunk.entry.shape or 0 in shape]
    alike = all(chunk.entry.dtype == first.dtype and len(chunk.offsets) == len(first.shape) for chunk in chunks)
    if not alike or not tiles(shape, [(chunk.offsets, chunk.entry.shape) for chunk in filled]):
        shown = ", ".join(f"{c.entry.dtype} {list(c.entry.shape)} at {list(c.offsets)}" for c in chunks[:_SHOWN])
        return Problem(
            "its boxes do not make it up",
            key=key,
            file=first.file,
            expected="boxes of one dtype that fill a tensor, each element once",
            found=shown + (", …" if len(chunks) > _SHOWN else ""),
            hint="pass the folder that has the files of all ranks",
        )
    if len(filled) == 1 or 0 in shape:
        return filled[0].entry
    return TensorEntry(key, shape, first.dtype, None, 0, prod(shape) * first.dtype.itemsize, None, tuple(filled))


def _end(chunk: Chunk) -> tuple[int, ...]:
    return tuple(offset + size for offset, size in zip(chunk.offsets, chunk.entry.shape))
