"""Following what an operation does with tensors that nobody has read: which elements of which entries end up where.

A `Traced` tensor has a shape, a dtype and tiles instead of values. Each tile says that one rectangular piece of it is a
view of an entry of the checkpoint. Calls that only move elements (slices, transpositions, reshapes, concatenations,
stacks) give traced tensors again; any other call raises `NotTraceable`. So operations of other libraries are taken as
they are and come out as `Part`s, for the engine to put each byte in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch

from weightlift.checkpoint.entry import TensorEntry
from weightlift.plan.parts import composed
from weightlift.plan.records import Offer, Part
from weightlift.plan.regions import narrow, permute, reshape
from weightlift.strides import row_major

aten = torch.ops.aten
_CPU = torch.device("cpu")


class NotTraceable(Exception):
    """An operation did more than move elements."""


class Tile:
    """A rectangular piece of a traced tensor, from ``start`` on and of ``size``, and the view of an entry that it is.

    ``origin`` has the shape of ``size`` but for dimensions of extent 1. So stacking makes no entry anew: there is a
    tile for every expert of every layer.
    """

    __slots__ = ("origin", "size", "start")

    def __init__(self, start: tuple[int, ...], size: tuple[int, ...], origin: TensorEntry) -> None:
        self.start = start
        self.size = size
        self.origin = origin

    @property
    def entry(self) -> TensorEntry:
        """The view, in the shape of the tile."""
        return self.origin if self.origin.shape == self.size else _shaped(self.origin, self.size)


def _tile(start: tuple[int, ...], entry: TensorEntry) -> Tile:
    return Tile(start, entry.shape, entry)


class Traced(torch.Tensor):
    """A tensor without values; ``tiles`` tile it."""

    tiles: Sequence[Tile]
    form: tuple[tuple[int, ...], torch.dtype]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, tiles: Sequence[Tile]) -> Traced:
        """A traced tensor of ``shape``."""
        made: Any = torch.Tensor._make_wrapper_subclass(Traced, tuple(shape), dtype=dtype, device=_CPU)
        made.tiles = tiles
        made.form = tuple(shape), dtype
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        rule = _RULES.get(func)
        if rule is None:
            raise NotTraceable(str(func))
        return rule(*args, **(kwargs or {}))

    def offer(self, name: str) -> Offer:
        """What a checkpoint offers under ``name``, by this tensor. Raises ValueError when the dtypes differ."""
        shape = self.form[0]
        if len(self.tiles) == 1 and self.tiles[0].entry.stride is None:
            entry = self.tiles[0].entry
            return Offer(name, entry.key, entry)
        steps = row_major(shape)
        shared: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]] = {}
        parts = []
        for tile in self.tiles:
            known = tile.size, tile.origin.shape
            shape_and_stride = shared.get(known)
            if shape_and_stride is None:
                shape_and_stride = shared[known] = tile.origin.shape, _without_ones(*known, steps)
            offset = 0
            for first, step in zip(tile.start, steps):
                offset += first * step
            parts.append(Part(tile.origin.key, tile.origin, *shape_and_stride, offset))
        return composed(name, shape, parts)


def _without_ones(
    size: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[int, ...]:
    """The strides of a view of ``size`` for ``shape``, which differs from it in dimensions of extent 1."""
    left = iter([step for extent, step in zip(size, stride, strict=True) if extent != 1])
    return tuple(1 if extent == 1 else next(left) for extent in shape)


class Wholes:
    """Traced tensors that stand for whole entries, used again once nobody else holds them: tens of thousands are asked
    for, a few hundred at a time. For one thread."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[Traced]] = {}

    def of(self, entry: TensorEntry) -> Traced:
        """A tensor of the checkpoint. Raises NotTraceable for one without elements."""
        if 0 in entry.shape:
            raise NotTraceable(f"{entry.key} is empty")
        tiles = (_tile((0,) * len(entry.shape), entry),)
        free = self._free.get((entry.shape, entry.dtype))
        if not free:
            return Traced.of(entry.shape, entry.dtype, tiles)
        made = free.pop()
        made.tiles = tiles
        return made

    def give(self, tensors: list[Traced]) -> None:
        """Take back, and out of the list, those that only this list still refers to."""
        while tensors:
            tensor = tensors.pop()
            if sys.getrefcount(tensor) == _HELD_HERE_ALONE:
                tensor.tiles = ()
                self._free.setdefault(tensor.form, []).append(tensor)


def _references() -> int:
    held = [object()]
    item = held.pop()
    return sys.getrefcount(item)


_HELD_HERE_ALONE = _references()


# -- calls that move elements -----------------------------------------------------------------------------------------


def _same(tensor: Traced, *_: Any, **__: Any) -> Traced:
    return Traced.of(tensor.shape, tensor.dtype, tensor.tiles)


def _cast(tensor: Traced, *, dtype: Any = None, device: Any = None, **_: Any) -> Traced:
    if dtype not in (None, tensor.dtype) or (device is not None and torch.device(device).type != "cpu"):
        raise NotTraceable("a cast")
    return _same(tensor)


def _slice(tensor: Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Traced:
    dim %= tensor.dim()
    low, high, stride = slice(start, end).indices(tensor.shape[dim])
    if step != 1 or stride != 1 or high <= low:
        raise NotTraceable("a slice with a step, or an empty one")
    shape = (*tensor.shape[:dim], high - low, *tensor.shape[dim + 1 :])
    tiles = []
    for tile in tensor.tiles:
        first, last = max(low, tile.start[dim]), min(high, tile.start[dim] + tile.size[dim])
        if first < last:
            entry = narrow(tile.entry, dim, first - tile.start[dim], last - first)
            tiles.append(_tile((*tile.start[:dim], first - low, *tile.start[dim + 1 :]), entry))
    return Traced.of(shape, tensor.dtype, tiles)


def _without(tensor: Traced, dim: int) -> Traced:
    """Drop a dimension of extent 1."""
    shape = (*tensor.shape[:dim], *tensor.shape[dim + 1 :])
    tiles = [
        Tile((*tile.start[:dim], *tile.start[dim + 1 :]), (*tile.size[:dim], *tile.size[dim + 1 :]), tile.origin)
        for tile in tensor.tiles
    ]
    return Traced.of(shape, tensor.dtype, tiles)


def _select(tensor: Traced, dim: int, index: int) -> Traced:
    dim %= tensor.dim()
    index %= tensor.shape[dim]
    return _without(_slice(tensor, dim, index, index + 1), dim)


def _unbind(tensor: Traced, dim: int = 0) -> list[Traced]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _split_sizes(tensor: Traced, sizes: Sequence[int], dim: int = 0) -> list[Traced]:
    pieces, low = [], 0
    for size in sizes:
        pieces.append(_slice(tensor, dim, low, low + size))
        low += size
    return pieces


def _split(tensor: Traced, size: int, dim: int = 0) -> list[Traced]:
    extent = tensor.shape[dim]
    return _split_sizes(tensor, [min(size, extent - low) for low in range(0, extent, size)], dim)


def _permute(tensor: Traced, dims: Sequence[int]) -> Traced:
    order = [dim % tensor.dim() for dim in dims]
    tiles = [_tile(tuple(tile.start[dim] for dim in order), permute(tile.entry, order)) for tile in tensor.tiles]
    return Traced.of([tensor.shape[dim] for dim in order], tensor.dtype, tiles)


def _transpose(tensor: Traced, first: int, second: int) -> Traced:
    order = list(range(tensor.dim()))
    order[first], order[second] = order[second], order[first]
    return _permute(tensor, order)


def _t(tensor: Traced) -> Traced:
    return _transpose(tensor, 0, 1) if tensor.dim() == 2 else _same(tensor)


def _unsqueeze(tensor: Traced, dim: int) -> Traced:
    return _stack([tensor], dim)


def _squeeze(tensor: Traced, dim: Any = None) -> Traced:
    dims = range(tensor.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    for index in sorted({item % tensor.dim() for item in dims}, reverse=True):
        if tensor.shape[index] == 1:
            tensor = _without(tensor, index)
    return _same(tensor)


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    shape, dtype = tensors[0].form
    tiles: list[Tile] = []
    low = 0
    if any(len(tensor.form[0]) != len(shape) or tensor.form[1] != dtype for tensor in tensors):
        raise NotTraceable("a concatenation of several dtypes")
    dim %= len(shape)
    for tensor in tensors:
        own = tensor.form[0]
        if own[:dim] != shape[:dim] or own[dim + 1 :] != shape[dim + 1 :]:
            raise RuntimeError(f"sizes of tensors to concatenate differ: {[list(item.shape) for item in tensors]}")
        if low == 0:
            tiles += tensor.tiles
        else:
            for tile in tensor.tiles:
                start = tile.start
                tiles.append(Tile((*start[:dim], start[dim] + low, *start[dim + 1 :]), tile.size, tile.origin))
        low += own[dim]
    return Traced.of((*shape[:dim], low, *shape[dim + 1 :]), dtype, tiles)


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    form = tensors[0].form
    if any(tensor.form != form for tensor in tensors):
        raise NotTraceable("a stack of several shapes or dtypes")
    shape, dtype = form
    dim %= len(shape) + 1
    whole = (*shape[:dim], 1, *shape[dim:])
    tiles = []
    for index, tensor in enumerate(tensors):
        for tile in tensor.tiles:
            start, size = tile.start, tile.size
            size = whole if size == shape else (*size[:dim], 1, *size[dim:])
            tiles.append(Tile((*start[:dim], index, *start[dim:]), size, tile.origin))
    return Traced.of((*shape[:dim], len(tensors), *shape[dim:]), dtype, tiles)


# -- reshapes ---------------------------------------------------------------------------------------------------------


def _view(tensor: Traced, shape: Sequence[int], *_: Any) -> Traced:
    wanted = list(shape)
    if -1 in wanted:
        wanted[wanted.index(-1)] = tensor.numel() // -prod(wanted)
    tiles = list(tensor.tiles)
    done = 0
    for old, new in _groups(tuple(tensor.shape), tuple(wanted)):
        if old != new:
            tiles = [made for tile in tiles for made in _regrouped(tile, done, old, new)]
        done += len(new)
    return Traced.of(wanted, tensor.dtype, tiles)


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shortest runs of dimensions that stand for one another."""
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while prod(old[first:i]) != prod(new[second:j]):
            if prod(old[first:i]) < prod(new[second:j]):
                i += 1
            else:
                j += 1
        yield old[first:i], new[second:j]


def _regrouped(tile: Tile, at: int, old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[Tile]:
    """The tiles that one becomes when its dimensions ``old``, the first of them number ``at``, become ``new``."""
    count = len(old)
    for begin, length, entry in _runs(tile.entry, tile.start[at : at + count], at, old):
        for start, size in _rectangles(begin, length, new):
            low = sum(first * step for first, step in zip(start, row_major(new), strict=True)) - begin
            cut = narrow(entry, at, low, prod(size))
            shaped = _shaped(cut, (*cut.shape[:at], *size, *cut.shape[at + 1 :]))
            yield _tile((*tile.start[:at], *start, *tile.start[at + count :]), shaped)


def _runs(
    entry: TensorEntry, start: tuple[int, ...], at: int, extents: tuple[int, ...]
) -> Iterator[tuple[int, int, TensorEntry]]:
    """Pieces of a tile that are consecutive in the group's flat order: their first place, length, and flat entry."""
    size = entry.shape[at : at + len(extents)]
    outer = next((i for i, extent in enumerate(size) if extent > 1), len(size))
    # Consecutive when only the outermost dimension that it extends in is cut.
    if size[outer + 1 :] == extents[outer + 1 :]:
        flat = reshape(entry, (*entry.shape[:at], prod(size), *entry.shape[at + len(size) :]))
        if flat is not None:
            begin = sum(first * step for first, step in zip(start, row_major(extents), strict=True))
            yield begin, prod(size), flat
            return
    for index in range(size[outer]):
        first = (*start[:outer], start[outer] + index, *start[outer + 1 :])
        yield from _runs(narrow(entry, at + outer, index, 1), first, at, extents)


def _rectangles(
    begin: int, length: int, extents: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rectangles (start, size) of ``extents`` that make the flat range ``[begin, begin + length)``."""
    if not extents:
        yield (), ()
        return
    inner = prod(extents[1:])
    end = begin + length
    while begin < end:
        rows = (end - begin) // inner if begin % inner == 0 else 0
        if rows:
            yield (begin // inner, *(0,) * (len(extents) - 1)), (rows, *extents[1:])
            begin += rows * inner
            continue
        stop = min(end, (begin // inner + 1) * inner)
        for start, size in _rectangles(begin % inner, stop - begin, extents[1:]):
            yield (begin // inner, *start), (1, *size)
        begin = stop


def _shaped(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    found = reshape(entry, shape)
    if found is None:
        raise NotTraceable(f"{entry.key} has no view of shape {shape}")
    return found


_RULES: dict[Any, Callable[..., Any]] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten.lift_fresh.default: _same,
    aten._to_copy.default: _cast,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten._reshape_alias.default: _view,
    aten.reshape.default: _view,
}
