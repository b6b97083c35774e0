"""What a destination is made of: parts of a checkpoint's tensors, each in its region.

A destination that is made of several tensors of a checkpoint (fused experts, joined q, k and v), or of pieces of one (a
rank's local shard), is a tuple of `Part`. Each takes the elements that a derived `TensorEntry` describes to a region of
the destination, which is counted as if it were row-major::

    down = [part(entry, select(whole((8, 16, 4)), 0, expert)) for expert, entry in enumerate(entries)]  # stacked
    half = local_parts(down, (8, 16, 4), start=(4, 0, 0), size=(4, 16, 4))  # the second half of the experts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import gcd, prod

from weightlift.checkpoint.entry import TensorEntry
from weightlift.plan.records import Offer, Part
from weightlift.plan.regions import Region, as_view, joined, narrow, region_of, reshape, whole
from weightlift.strides import is_row_major, row_major, span_elements

_LARGEST_CHECKED = 1 << 22


def part(entry: TensorEntry, region: Region, *, key: str | None = None) -> Part:
    """Take ``entry`` to ``region``, element by element. ``key`` is what messages call it (None: the entry's).

    Raises ValueError when the shapes differ.
    """
    if entry.shape != region.shape:
        raise ValueError(f"{entry.key} of shape {entry.shape} does not fill a region of shape {region.shape}")
    return Part(entry.key if key is None else key, entry, region.shape, region.stride, region.offset)


def composed(name: str, shape: Sequence[int], parts: Iterable[Part], *, key: str | None = None) -> Offer:
    """An offer under ``name`` whose value of ``shape`` is made of ``parts`` of one dtype.

    ``key`` stands for it in messages (None: the keys of all parts). Raises ValueError when the parts overlap, leave a
    hole, or have several dtypes.
    """
    parts = tuple(parts)
    keys = dict.fromkeys(item.key for item in parts)
    dtypes = {item.entry.dtype for item in parts}
    if len(dtypes) != 1:
        raise ValueError(f"the parts of {name} have {len(dtypes)} dtypes")
    if (fault := fault_of(parts, shape)) is not None:
        raise ValueError(f"the parts of {name}: {fault}")
    dtype = dtypes.pop()
    key = ", ".join(keys) if key is None else key
    entry = TensorEntry(key, tuple(shape), dtype, None, 0, prod(shape) * dtype.itemsize)
    return Offer(name, key, entry, parts=parts)


def local_parts(
    parts: Sequence[Part],
    shape: Sequence[int],
    *,
    start: Sequence[int],
    size: Sequence[int],
    local: Region | None = None,
) -> tuple[Part, ...]:
    """The parts of one box of a destination, such as a rank's local shard.

    ``parts`` make a tensor of ``shape`` (a whole tensor ``entry`` is ``[part(entry, whole(entry.shape))]``); the box is
    ``[start, start + size)`` in every dimension. ``local`` is the region of the local tensor that the box fills (None:
    all of it). Where a shard is several boxes, join what this gives for each of them.
    """
    target = whole(size) if local is None else local
    if target.shape != tuple(size):
        raise ValueError(f"a box of {tuple(size)} does not fill a region of shape {target.shape}")
    return tuple(
        _placed(piece, owners, shape, start, target)
        for item in parts
        for piece, owners in _clipped(item, tuple(shape), tuple(start), tuple(size))
    )


def fault_of(parts: Sequence[Part], shape: Sequence[int]) -> str | None:
    """What is wrong with ``parts`` of a destination of ``shape``: an overlap, a hole, a place outside. None: nothing.

    Exact up to four million units, a unit being the longest run that divides all regions evenly; beyond that elements
    are counted only.
    """
    total = prod(shape)
    count = 0
    dense = True
    runs: list[tuple[int, int]] = []
    measures: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, bool, int]] = {}  # few kinds of very many parts
    for item in parts:
        if item.entry.shape != item.shape:
            return f"{item.key} of shape {item.entry.shape} for a region of shape {item.shape}"
        kind = item.shape, item.stride
        measure = measures.get(kind)
        if measure is None:
            measure = measures[kind] = _measure(*kind)
        numel, consecutive, span = measure
        if numel == 0:
            continue
        if item.offset < 0 or item.offset + span > total:
            return "one lies outside of the destination"
        count += numel
        dense = dense and consecutive
        runs.append((item.offset, item.offset + span))
    if count != total:
        return f"they have {count:,} elements, the destination {total:,}"
    if dense:
        runs.sort()
        return None if all(end <= start for (_, end), (start, _) in pairwise(runs)) else "two of them overlap"
    regions = [Region(item.shape, item.stride, item.offset) for item in parts if 0 not in item.shape]
    return "two of them overlap" if _overlap([joined(found) for found in regions], total) else None


def _measure(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, bool, int]:
    """(elements, whether they lie in a row, elements from the first to the last) of a region."""
    numel = prod(shape)
    consecutive = is_row_major(shape, stride)
    return numel, consecutive, numel if consecutive or not numel else span_elements(shape, stride)


def within(entry: TensorEntry, region: Region) -> TensorEntry | None:
    """The elements of ``entry`` that ``region`` takes of it, counted as if it were row-major; None where that is no
    strided view of what the entry itself is."""
    if entry.stride is None:
        return as_view(entry, region)
    contiguous = replace(entry, shape=region.shape, stride=None)
    try:
        item, owners = _separated(part(contiguous, region), entry.shape)
    except ValueError:
        return None
    placed = _placed(item, owners, entry.shape, (0,) * len(entry.shape), region_of(entry))
    return reshape(as_view(entry, Region(placed.shape, placed.stride, placed.offset)), region.shape)


def paired(one: Offer, other: Offer) -> list[tuple[TensorEntry, TensorEntry]] | None:
    """Two values of one shape as pairs of entries that hold the same elements of them; None where they are made of
    parts that cannot be told apart so."""
    shape = one.entry.shape
    if not one.parts and not other.parts:
        return [(one.entry, other.entry)]
    if one.parts and _regions(one) == _regions(other):
        return list(zip(one.entries, other.entries, strict=True))
    if other.entry.shape != shape or 0 in shape:
        return [] if other.entry.shape == shape else None
    mine, theirs = (offer.parts or (part(offer.entry, whole(shape)),) for offer in (one, other))
    pairs = []
    for item in mine:
        start = _corner(item, shape)
        if start is None:
            return None
        try:
            pieces = local_parts(theirs, shape, start=start, size=item.shape)
        except ValueError:
            return None
        for piece in pieces:
            entry = within(item.entry, Region(piece.shape, piece.stride, piece.offset))
            if entry is None:
                return None
            pairs.append((entry, piece.entry))
    return pairs


def box_of(offer: Offer, region: Region) -> Offer | None:
    """What an offer that is made of parts says about a region of its value; None where that is no box of it."""
    shape = offer.entry.shape
    start = _corner(region, shape)
    if start is None:
        return None
    try:
        parts = local_parts(offer.parts, shape, start=start, size=region.shape)
    except ValueError:
        return None
    nbytes = prod(region.shape) * offer.entry.dtype.itemsize
    return offer._replace(entry=replace(offer.entry, shape=region.shape, end=nbytes, chunks=()), parts=parts)


def _regions(offer: Offer) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    return [(item.shape, item.stride, item.offset) for item in offer.parts]


def _corner(item: Part | Region, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Where the box begins that a part fills; None if it fills none."""
    steps = row_major(shape)
    if len(item.shape) != len(steps):
        return None
    if any(extent > 1 and stride != step for extent, stride, step in zip(item.shape, item.stride, steps)):
        return None
    start = tuple(item.offset // step % size for step, size in zip(steps, shape))
    return start if all(low + extent <= size for low, extent, size in zip(start, item.shape, shape)) else None


def overlap(regions: Sequence[Region]) -> bool:
    """Whether two of the regions, or two elements of one, share a place; as exact as `fault_of`."""
    filled = [region for region in regions if 0 not in region.shape]
    total = max((found.offset + span_elements(found.shape, found.stride) for found in filled), default=0)
    return _overlap([joined(found) for found in filled], total)


def _overlap(regions: Sequence[Region], total: int) -> bool:
    """Whether two elements of joined regions share a place."""
    unit = total
    for found in regions:
        run = found.shape[-1] if found.stride and found.stride[-1] == 1 else 1
        outer = found.stride[:-1] if found.stride and found.stride[-1] == 1 else found.stride
        unit = gcd(unit, run, found.offset, *outer)
    if total == 0 or total // unit > _LARGEST_CHECKED:
        return False
    seen = bytearray(total // unit)
    for found in regions:
        shape, stride = found.shape, tuple(step // unit for step in found.stride)
        if found.stride and found.stride[-1] == 1:
            shape, stride = (*shape[:-1], shape[-1] // unit), (*stride[:-1], 1)
        if not shape:
            shape, stride = (1,), (1,)
        for low in _starts(shape[:-1], stride[:-1], found.offset // unit):
            places = slice(low, low + (shape[-1] - 1) * stride[-1] + 1, stride[-1] or 1)
            if stride[-1] == 0 or any(seen[places]):
                return True
            seen[places] = b"\1" * shape[-1]
    return False


def _starts(shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Iterator[int]:
    if not shape:
        yield offset
        return
    for index in range(shape[0]):
        yield from _starts(shape[1:], stride[1:], offset + index * stride[0])


_Indices = tuple[int, ...]  # for each dimension of a part the destination's that it belongs to; -1: its extent is 1


def _clipped(
    item: Part, shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]
) -> Iterator[tuple[Part, _Indices]]:
    """The pieces of a part that lie in a box, each with the owners of its dimensions."""
    if 0 in item.shape or 0 in size:
        return
    item, owners = _separated(item, shape)
    pieces = [item]
    for dim, (low, extent) in enumerate(zip(start, size, strict=True)):
        mine = sorted((i for i, owner in enumerate(owners) if owner == dim), key=lambda i: -item.stride[i])
        pieces = [cut for piece in pieces for cut in _between(piece, mine, shape, dim, low, low + extent)]
    for piece in pieces:
        yield piece, owners


def _between(item: Part, mine: Sequence[int], shape: tuple[int, ...], dim: int, low: int, high: int) -> Iterator[Part]:
    """What of a part has its index of ``dim`` within ``low:high``; ``mine`` are its own dimensions for that one, the
    one with the largest stride first."""
    step = row_major(shape)[dim]
    first = item.offset // step % shape[dim]
    last = first + sum((item.shape[i] - 1) * item.stride[i] // step for i in mine)
    if low <= first and last < high:
        yield item
        return
    if last < low or first >= high or not mine:
        return
    outer, inner = mine[0], mine[1:]
    stride = item.stride[outer] // step
    spread = last - first - (item.shape[outer] - 1) * stride
    # Those that lie inside with all that hangs on them go as one piece, each of the others by itself.
    begin = min(max(-(-(low - first) // stride), 0), item.shape[outer])
    end = max(min((high - 1 - spread - first) // stride + 1, item.shape[outer]), begin)
    if end > begin:
        yield _sliced(item, outer, begin, end - begin)
    for index in (*range(begin), *range(end, item.shape[outer])):
        if first + index * stride + spread >= low and first + index * stride < high:
            yield from _between(_sliced(item, outer, index, 1), inner, shape, dim, low, high)


def _sliced(item: Part, dim: int, start: int, length: int) -> Part:
    found = narrow(Region(item.shape, item.stride, item.offset), dim, start, length)
    return part(narrow(item.entry, dim, start, length), found, key=item.key)


def _separated(item: Part, shape: tuple[int, ...]) -> tuple[Part, _Indices]:
    """A part none of whose dimensions runs across several of the destination's, and for each of its own which one it
    belongs to."""
    steps = row_major(shape)
    owners: list[int] = []
    dim = 0
    while dim < len(item.shape):
        extent, step = item.shape[dim], item.stride[dim]
        if extent == 1:
            owners.append(-1)
            dim += 1
            continue
        owner = min(i for i, size in enumerate(steps) if size <= step and shape[i] > 1)
        if step % steps[owner]:
            raise _unruly(item, shape)
        room = shape[owner] - item.offset // steps[owner] % shape[owner]
        if (extent - 1) * step // steps[owner] < room:
            owners.append(owner)
            dim += 1
            continue
        inner = shape[owner] * steps[owner] // step
        if extent % inner or shape[owner] * steps[owner] % step or item.offset // steps[owner] % shape[owner]:
            raise _unruly(item, shape)
        split = (*item.shape[:dim], extent // inner, inner, *item.shape[dim + 1 :])
        found = reshape(Region(item.shape, item.stride, item.offset), split)
        entry = reshape(item.entry, split)
        assert found is not None and entry is not None
        item = part(entry, found, key=item.key)
    for owner, (steps_of, room) in enumerate(zip(steps, shape, strict=True)):
        mine = [i for i, of in enumerate(owners) if of == owner]
        last = sum((item.shape[i] - 1) * item.stride[i] for i in mine) // steps_of
        if item.offset // steps_of % room + last >= room:
            raise _unruly(item, shape)
    return item, tuple(owners)


def _unruly(item: Part, shape: Sequence[int]) -> ValueError:
    return ValueError(f"{item.key} fills a region that does not follow the dimensions of {tuple(shape)}")


def _placed(item: Part, owners: _Indices, shape: Sequence[int], start: Sequence[int], target: Region) -> Part:
    """A piece of a destination of ``shape``, in the coordinates of a box that begins at ``start`` and lies at
    ``target``."""
    steps = row_major(shape)
    offset = target.offset
    for dim, step in enumerate(steps):
        offset += (item.offset // step % shape[dim] - start[dim]) * target.stride[dim]
    stride = tuple(
        0 if owner < 0 else step // steps[owner] * target.stride[owner]
        for owner, step in zip(owners, item.stride, strict=True)
    )
    return part(item.entry, Region(item.shape, stride, offset), key=item.key)
