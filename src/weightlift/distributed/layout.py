"""Which elements of a tensor one rank of a mesh holds: pure geometry, no process group and no tensor.

A mesh axis that shards a dim is a `Split`. A rank's part of a dim is a list of intervals, more than one where FSDP
shards what tensor parallelism has sharded before (torch's ``_StridedShard``); a rank's part of a tensor is the product
of those: a few boxes. Thousands of ranks can be worked out on paper this way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

Interval = tuple[int, int]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """One mesh axis that shards ``dim`` into ``parts``, of which this rank holds number ``index``.

    ``interleave`` is the split factor of torch's ``_StridedShard``: the dim counts as that many stretches, each of
    which is sharded; 1 is an ordinary ``Shard``. Sizes follow ``torch.chunk``: the last parts may be short or empty.
    """

    dim: int
    parts: int
    index: int
    interleave: int = 1


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a tensor: it begins at ``start`` in the whole tensor and at ``at`` in the rank's local shard."""

    start: Shape
    at: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor of ``shape`` as one rank holds it. ``splits`` are in the order of the mesh's axes."""

    shape: Shape
    splits: tuple[Split, ...] = ()

    @property
    def local_shape(self) -> Shape:
        """The shape of the rank's local shard."""
        return tuple(sum(end - start for start, end in intervals) for intervals in self._intervals())

    def boxes(self) -> tuple[Box, ...]:
        """The parts of the whole tensor that make up the local shard; none for an empty one."""
        columns = [list(_with_positions(intervals)) for intervals in self._intervals()]
        found = []
        for combination in itertools.product(*columns):
            sizes = tuple(end - start for start, end, _ in combination)
            box = Box(tuple(start for start, _, _ in combination), tuple(at for _, _, at in combination), sizes)
            if box.numel:
                found.append(box)
        return tuple(found)

    def as_fsdp_shards(self) -> Layout:
        """What FSDP2 really keeps of a tensor that was sharded before: a chunk of the chunk.

        ``_StridedShard`` is to say the same, and does for sizes that divide evenly. For others torch's spec can name
        other rows than those that FSDP2 gathers for a forward.
        """
        for number, split in enumerate(self.splits):
            before = (other.parts for other in self.splits[number + 1 :] if other.dim == split.dim)
            if split.interleave > 1 and split.interleave == prod(before):
                # What FSDP2 found sharded was cut in the order of the axes; FSDP2's own cut comes last.
                others = self.splits[:number] + self.splits[number + 1 :]
                return Layout(self.shape, (*others, replace(split, interleave=1)))
        return self

    def _intervals(self) -> list[list[Interval]]:
        """What is held of each dim, in the local shard's order."""
        held: list[list[Interval]] = [[(0, extent)] for extent in self.shape]
        for split in self.splits:
            held[split.dim] = _split(held[split.dim], split)
        return [_merged(intervals) for intervals in held]


def splits_of(
    placements: Sequence[Any], mesh_shape: Sequence[int], coordinate: Sequence[int], dims: int
) -> list[Split]:
    """The splits that torch's placements mean for the rank at ``coordinate``.

    Raises ValueError for ``Partial`` and for placements of unknown kinds: such a tensor has no part to read.
    """
    found = []
    for placement, parts, index in zip(placements, mesh_shape, coordinate, strict=True):
        kind = type(placement).__name__
        if kind in ("Shard", "_StridedShard"):
            dim = placement.dim + dims if placement.dim < 0 else placement.dim
            if not 0 <= dim < dims:
                raise ValueError(f"{placement} does not fit a tensor of {dims} dims")
            found.append(Split(dim, parts, index, int(getattr(placement, "split_factor", 1))))
        elif kind != "Replicate":
            raise ValueError(f"{placement} says not which part of the tensor a rank holds")
    return found


def coordinates(mesh_shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every rank's coordinate, in the order of ranks."""
    return itertools.product(*(range(size) for size in mesh_shape))


def _split(intervals: list[Interval], split: Split) -> list[Interval]:
    length = sum(end - start for start, end in intervals)
    held: list[Interval] = []
    for low, high in _chunks(0, length, split.interleave):
        mine = list(_chunks(low, high, split.parts))[split.index]
        held += _select(intervals, *mine)
    return held


def _chunks(low: int, high: int, count: int) -> Iterator[Interval]:
    """``low:high`` as ``torch.chunk`` cuts it, with empty chunks at the end where it gives fewer."""
    step = -(-(high - low) // count)
    for number in range(count):
        yield min(low + number * step, high), min(low + (number + 1) * step, high)


def _select(intervals: list[Interval], low: int, high: int) -> Iterator[Interval]:
    """The stretch ``low:high`` of the concatenated intervals."""
    at = 0
    for start, end in intervals:
        first, last = max(low - at, 0), min(high - at, end - start)
        if first < last:
            yield start + first, start + last
        at += end - start


def _merged(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in intervals:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _with_positions(intervals: list[Interval]) -> Iterator[tuple[int, int, int]]:
    at = 0
    for start, end in intervals:
        yield start, end, at
        at += end - start
