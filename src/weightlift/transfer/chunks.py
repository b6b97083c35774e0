"""Pure scheduling: requests for tensors become pieces of work of bounded size. No I/O, no tensors.

Small neighbours share one read; large tensors are cut, so that all workers are busy and what is in flight stays within
the budget. The destination ranges of all pieces are disjoint: every destination byte has exactly one writer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

from weightlift.dtypes import LARGEST_ELEMENT_BYTES
from weightlift.strides import row_major, span_elements
from weightlift.transfer.combs import has_gaps, ranges_of

_MIB = 1 << 20
_HUGE_PAGE_BYTES = 2 * _MIB
# Smaller tensors go through a shared block: the extra copy stays in the cache and costs less than a read of its own.
_SMALL_BYTES = 256 << 10
_GAP_BYTES = 64 << 10
# About a core's own cache: what was just read is still there when it is converted (measured: 256 KiB costs 40% more
# processor time, 8 MiB 10–40%).
_MAX_BLOCK_BYTES = 2 * _MIB
# What goes to a device is not worked on here, and each block costs calls and a copy of the bus: fewer are better.
_MAX_UPLOAD_BYTES = 8 * _MIB
_MIN_BLOCK_BYTES = 16 << 10
# Blocks a worker may have in flight: an accelerator's worker reads one while another is copied, and data that is not
# aligned to its element needs a second place while it is converted.
_BLOCKS_PER_WORKER = 3
_MAX_DIRECT_BYTES = 16 * _MIB
_PIECES_PER_WORKER = 4
_ONE = (1,)


class Request(NamedTuple):
    """One tensor as the chunker sees it: geometry only, strides in elements.

    ``nbytes`` counts the elements in the source's dtype. ``file`` is None for a tensor in memory. A stride of None
    means contiguous in row-major order. ``direct``: the file's bits are the destination's bits, so that what is
    contiguous in both can be read straight into it. Only requests of one ``place`` (the destination's device) share a
    read. ``offset`` is where in the job's destination it begins, in elements.
    """

    job: int
    file: Path | None
    start: int
    itemsize: int
    nbytes: int
    shape: tuple[int, ...]
    src_stride: tuple[int, ...] | None
    dst_stride: tuple[int, ...] | None
    direct: bool
    place: str = "cpu"
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Direct:
    """Bytes ``start:end`` of ``file`` go straight to the job's memory, from its byte ``at`` on."""

    job: int
    file: Path
    start: int
    end: int
    at: int

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return self.end - self.start


class Cut(NamedTuple):
    """A hyper-rectangle of one job's elements: byte ``at`` of the block (or of the tensor in memory), with strides and
    the destination's offset in elements. ``nbytes`` counts its elements in the source's dtype."""

    job: int
    at: int
    sizes: tuple[int, ...]
    src_stride: tuple[int, ...]
    dst_stride: tuple[int, ...]
    dst_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes ``start:end`` of ``file`` are read into staging, then ``cuts`` are copied from there. With ``file`` None
    there is nothing to read: the one cut is copied from a tensor in memory. With ``ranges`` only these are read, and
    lie one after the other in staging."""

    file: Path | None
    start: int
    end: int
    cuts: tuple[Cut, ...]
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def reads(self) -> tuple[tuple[int, int], ...]:
        """The byte ranges to read, in the order in which they are staged."""
        return self.ranges or ((self.start, self.end),)

    @property
    def nbytes(self) -> int:
        """Source bytes of all cuts; gaps that are read along do not count."""
        return sum(cut.nbytes for cut in self.cuts)


Piece = Direct | Block
_Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes, in bytes, and the number of workers that they allow. ``upload_bytes``: of blocks that go to a device."""

    block_bytes: int
    upload_bytes: int
    direct_bytes: int
    workers: int

    def staged_bytes(self, place: str) -> int:
        """The most that a block for this place holds."""
        return self.block_bytes if place == "cpu" else self.upload_bytes


def limits(total_bytes: int, workers: int, budget_bytes: int) -> Limits:
    """Sizes for a run that moves ``total_bytes`` of which at most the budget is in flight beside the destinations.

    A small budget first makes the blocks smaller, then the workers fewer; a budget that does not hold one worker's
    smallest blocks (48 KiB) counts as that much.
    """
    share = -(-total_bytes // (workers * _PIECES_PER_WORKER))
    most = min(max(share, _SMALL_BYTES), budget_bytes // (_BLOCKS_PER_WORKER * workers))
    block = max(min(most, _MAX_BLOCK_BYTES) // LARGEST_ELEMENT_BYTES * LARGEST_ELEMENT_BYTES, _MIN_BLOCK_BYTES)
    # A power of two: torch rounds pinned memory up to one.
    upload = max(1 << min(most, _MAX_UPLOAD_BYTES).bit_length() >> 1, _MIN_BLOCK_BYTES)
    # Whole huge pages, so that two workers do not fault the same one.
    direct = min(max(-(-share // _HUGE_PAGE_BYTES), 1) * _HUGE_PAGE_BYTES, _MAX_DIRECT_BYTES)
    return Limits(block, upload, direct, max(1, min(workers, budget_bytes // (_BLOCKS_PER_WORKER * block))))


def overlapping(ranges: Sequence[tuple[int, int]]) -> set[int]:
    """Indices of half-open ranges that begin inside an earlier one (in order of their starts)."""
    found: set[int] = set()
    reached = -1
    starts = [start for start, _ in ranges]
    for index in sorted(range(len(ranges)), key=starts.__getitem__):
        start, end = ranges[index]
        if start >= end:
            continue
        if start < reached:
            found.add(index)
        reached = max(reached, end)
    return found


def boxes(shape: tuple[int, ...], stride: tuple[int, ...], limit: int, gap: int | None = None) -> Iterator[_Box]:
    """Cut a non-empty view into hyper-rectangles ``(starts, sizes)`` whose memory spans at most ``limit`` elements, and
    has no hole of more than ``gap`` elements in it.

    The dimension with the largest stride is cut first, so that a transposed view is still read in long stretches.
    """
    order = sorted(range(len(shape)), key=lambda dim: -stride[dim])
    apart = 0 if gap is None else _depth_of_holes(shape, stride, order, gap)
    return _cut(_Cuts(stride, order, limit, apart), 0, (0,) * len(shape), shape)


class _Cuts(NamedTuple):
    stride: tuple[int, ...]
    order: Sequence[int]  # of the dimensions
    limit: int
    apart: int  # so many of them are cut into single steps


def _cut(cuts: _Cuts, depth: int, starts: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[_Box]:
    # No function within `boxes`: one that calls itself is a cycle, left to the collector by every load.
    stride, order, limit, apart = cuts
    if depth == len(order) or (depth >= apart and span_elements(sizes, stride) <= limit):
        yield starts, sizes
        return
    dim = order[depth]
    inner = span_elements(_replace(sizes, dim, 1), stride)
    step = 1 + (limit - inner) // max(stride[dim], 1) if inner <= limit and depth >= apart else 1
    for low in range(0, sizes[dim], step):
        part = _replace(sizes, dim, min(step, sizes[dim] - low))
        yield from _cut(cuts, depth + 1, _replace(starts, dim, low), part)


def _depth_of_holes(shape: tuple[int, ...], stride: tuple[int, ...], order: Sequence[int], gap: int) -> int:
    """How many of the dimensions, in ``order``, have to be cut into single steps for there to be no larger hole."""
    depth, span = 0, 1
    for at in range(len(order) - 1, -1, -1):
        dim = order[at]
        if shape[dim] > 1 and stride[dim] - span > gap:
            depth = max(depth, at + 1)
        span += (shape[dim] - 1) * stride[dim]
    return depth


def pieces(requests: Sequence[Request], limit: Limits) -> list[Piece]:
    """The work of a run, in the order of files and offsets."""
    result: list[Piece] = []
    files: dict[tuple[Path, str], list[Request]] = {}
    for request in requests:
        if request.file is None:
            cuts = _cuts(request, limit.staged_bytes(request.place))
            result += (Block(None, 0, 0, (cut,)) for cut, _, _ in cuts)
        else:
            files.setdefault((request.file, request.place), []).append(request)
    for (file, place), group in files.items():
        group.sort(key=lambda request: request.start)
        result += _file_pieces(file, group, limit.staged_bytes(place), limit.direct_bytes)
    return result


def _file_pieces(file: Path, group: list[Request], block_bytes: int, direct_bytes: int) -> Iterator[Piece]:
    direct_from = min(_SMALL_BYTES, block_bytes)
    start = end = -1
    cuts: list[Cut] = []
    for request in group:
        nbytes = request.nbytes
        if request.src_stride is not None or request.dst_stride is not None or nbytes >= direct_from:
            if request.direct and _run_bytes(request) >= direct_from:
                yield from _direct_pieces(file, request, direct_bytes)
                continue
            if request.src_stride is not None and has_gaps(request.shape, request.src_stride, request.itemsize):
                yield from _comb_pieces(file, request, request.src_stride, block_bytes)
                continue
            found: Iterable[tuple[Cut, int, int]] = _cuts(request, block_bytes)
        else:  # nearly all tensors of a checkpoint of very many
            low, high = request.start, request.start + nbytes
            if cuts and start <= low <= end + _GAP_BYTES and max(high, end) - start <= block_bytes:
                cuts.append(_whole(request, low - start))
                end = max(end, high)
                continue
            found = ((_whole(request), low, high),)
        for cut, low, high in found:
            # ``low`` lies before the block when tensors overlap: the tail of a large one, then the start of the next.
            apart = low < start or low > end + _GAP_BYTES
            if cuts and (apart or max(high, end) - start > block_bytes):
                yield Block(file, start, end, tuple(cuts))
                cuts = []
            if not cuts:
                start = end = low
            cuts.append(cut if low == start else cut._replace(at=low - start))
            end = max(end, high)
    if cuts:
        yield Block(file, start, end, tuple(cuts))


def _run_bytes(request: Request) -> int:
    """Bytes that lie one after the other in the file and in the destination."""
    if request.src_stride is None and request.dst_stride is None:
        return request.nbytes
    src, dst = _strides(request)
    return request.shape[-1] * request.itemsize if request.shape and src[-1] == dst[-1] == 1 else 0


def _strides(request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
    default = row_major(request.shape)
    return request.src_stride or default, request.dst_stride or default


def _direct_pieces(file: Path, request: Request, step: int) -> Iterator[Direct]:
    run, itemsize = _run_bytes(request), request.itemsize
    src, dst = _strides(request)
    outer = () if run == request.nbytes else request.shape[:-1]
    for index in product(*map(range, outer)):
        low = request.start + sum(i * stride for i, stride in zip(index, src)) * itemsize
        into = (request.offset + sum(i * stride for i, stride in zip(index, dst))) * itemsize
        for at in range(0, run, step):
            yield Direct(request.job, file, low + at, min(low + at + step, low + run), into + at)


def _comb_pieces(file: Path, request: Request, stride: tuple[int, ...], block_bytes: int) -> Iterator[Block]:
    """Runs with gaps between them that are not worth reading, staged without the gaps."""
    shape, itemsize = request.shape, request.itemsize
    dst = row_major(shape) if request.dst_stride is None else request.dst_stride
    for starts, sizes in boxes(shape, row_major(shape), max(block_bytes // itemsize, 1)):
        low = request.start + sum(a * b for a, b in zip(starts, stride, strict=True)) * itemsize
        into = request.offset + sum(a * b for a, b in zip(starts, dst, strict=True))
        nbytes = prod(sizes) * itemsize
        ranges = tuple(ranges_of(low, sizes, stride, itemsize))
        cut = Cut(request.job, 0, sizes, row_major(sizes), dst, into, nbytes)
        yield Block(file, low, ranges[-1][1], (cut,), ranges)


def _cuts(request: Request, block_bytes: int) -> Iterator[tuple[Cut, int, int]]:
    """A request's cuts of at most ``block_bytes``, each with the byte range of the file that it needs.

    In a file a cut's ``at`` is 0 (the block's start); in memory it counts from the tensor's first element.
    """
    shape, src, dst = request.shape, request.src_stride, request.dst_stride
    if src is None and dst is None:
        if request.nbytes <= block_bytes:
            yield _whole(request), request.start, request.start + request.nbytes
            return
        shape, src, dst = (prod(shape),), (1,), (1,)
    src = row_major(shape) if src is None else src
    dst = row_major(shape) if dst is None else dst
    itemsize = request.itemsize
    gap = _GAP_BYTES // itemsize if request.file else None
    for starts, sizes in boxes(shape, src, max(block_bytes // itemsize, 1), gap):
        at = sum(a * b for a, b in zip(starts, src, strict=True)) * itemsize
        into = request.offset + sum(a * b for a, b in zip(starts, dst, strict=True))
        low = request.start + at
        high = low + span_elements(sizes, src) * itemsize
        cut = Cut(request.job, 0 if request.file else at, sizes, src, dst, into, prod(sizes) * itemsize)
        yield cut, low, high


def _whole(request: Request, at: int = 0) -> Cut:
    """All of what lies in a row in the file and in the destination."""
    nbytes = request.nbytes
    return Cut(request.job, at, (nbytes // request.itemsize,), _ONE, _ONE, request.offset, nbytes)


def _replace(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])
