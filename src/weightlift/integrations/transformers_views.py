"""Following what an operation does with tensors that nobody has read: which elements of which entries end up where.

A `Traced` tensor has a shape, a dtype and boxes instead of values. Each box says that one rectangular piece of it is a
view of an entry of the checkpoint. Calls that only move elements (slices, transpositions, reshapes, concatenations,
stacks) give traced tensors again; any other call raises `NotTraceable`. So operations of other libraries are taken as
they are and come out as `Part`s, for the engine to put each byte in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from weightlift.checkpoint.entry import TensorEntry
from weightlift.plan.parts import composed, part
from weightlift.plan.records import Offer
from weightlift.plan.regions import Region, narrow, permute, reshape, unsqueeze
from weightlift.strides import row_major

aten = torch.ops.aten
_CPU = torch.device("cpu")


class NotTraceable(Exception):
    """An operation did more than move elements."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular piece of a traced tensor, from ``start`` on, and the view of an entry that it is."""

    start: tuple[int, ...]
    entry: TensorEntry

    @property
    def size(self) -> tuple[int, ...]:
        """Extents, those of the entry."""
        return self.entry.shape


class Traced(torch.Tensor):
    """A tensor without values; ``boxes`` tile it."""

    boxes: tuple[Box, ...]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box]) -> Traced:
        """A traced tensor of ``shape``."""
        made: Any = torch.Tensor._make_wrapper_subclass(Traced, tuple(shape), dtype=dtype, device=_CPU)
        made.boxes = tuple(boxes)
        return made  # type: ignore[no-any-return]

    @staticmethod
    def whole(entry: TensorEntry) -> Traced:
        """A tensor of the checkpoint."""
        if 0 in entry.shape:
            raise NotTraceable(f"{entry.key} is empty")
        return Traced.of(entry.shape, entry.dtype, (Box((0,) * len(entry.shape), entry),))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        rule = _RULES.get(func)
        if rule is None:
            raise NotTraceable(str(func))
        return rule(*args, **(kwargs or {}))

    def offer(self, name: str) -> Offer:
        """What a checkpoint offers under ``name``, by this tensor. Raises ValueError when the dtypes differ."""
        shape = tuple(self.shape)
        if len(self.boxes) == 1 and self.boxes[0].entry.stride is None:
            entry = self.boxes[0].entry
            return Offer(name, entry.key, entry)
        steps = row_major(shape)
        parts = []
        for box in self.boxes:
            offset = sum(first * step for first, step in zip(box.start, steps, strict=True))
            parts.append(part(box.entry, Region(box.size, steps, offset)))
        return composed(name, shape, parts)


# -- calls that move elements -----------------------------------------------------------------------------------------


def _same(tensor: Traced, *_: Any, **__: Any) -> Traced:
    return Traced.of(tensor.shape, tensor.dtype, tensor.boxes)


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
    boxes = []
    for box in tensor.boxes:
        first, last = max(low, box.start[dim]), min(high, box.start[dim] + box.size[dim])
        if first < last:
            entry = narrow(box.entry, dim, first - box.start[dim], last - first)
            boxes.append(Box((*box.start[:dim], first - low, *box.start[dim + 1 :]), entry))
    return Traced.of(shape, tensor.dtype, boxes)


def _without(tensor: Traced, dim: int) -> Traced:
    """Drop a dimension of extent 1."""
    shape = (*tensor.shape[:dim], *tensor.shape[dim + 1 :])
    boxes = [
        Box((*box.start[:dim], *box.start[dim + 1 :]), _shaped(box.entry, (*box.size[:dim], *box.size[dim + 1 :])))
        for box in tensor.boxes
    ]
    return Traced.of(shape, tensor.dtype, boxes)


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
    boxes = [Box(tuple(box.start[dim] for dim in order), permute(box.entry, order)) for box in tensor.boxes]
    return Traced.of([tensor.shape[dim] for dim in order], tensor.dtype, boxes)


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
    first = tensors[0]
    if any(tensor.dim() != first.dim() or tensor.dtype != first.dtype for tensor in tensors):
        raise NotTraceable("a concatenation of several dtypes")
    dim %= first.dim()
    boxes, low = [], 0
    for tensor in tensors:
        if any(a != b for i, (a, b) in enumerate(zip(tensor.shape, first.shape, strict=True)) if i != dim):
            raise RuntimeError(f"sizes of tensors to concatenate differ: {[list(item.shape) for item in tensors]}")
        boxes += [
            Box((*box.start[:dim], box.start[dim] + low, *box.start[dim + 1 :]), box.entry) for box in tensor.boxes
        ]
        low += tensor.shape[dim]
    return Traced.of((*first.shape[:dim], low, *first.shape[dim + 1 :]), first.dtype, boxes)


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first = tensors[0]
    if any(tensor.shape != first.shape or tensor.dtype != first.dtype for tensor in tensors):
        raise NotTraceable("a stack of several shapes or dtypes")
    dim %= first.dim() + 1
    boxes = [
        Box((*box.start[:dim], index, *box.start[dim:]), unsqueeze(box.entry, dim))
        for index, tensor in enumerate(tensors)
        for box in tensor.boxes
    ]
    return Traced.of((*first.shape[:dim], len(tensors), *first.shape[dim:]), first.dtype, boxes)


# -- reshapes ---------------------------------------------------------------------------------------------------------


def _view(tensor: Traced, shape: Sequence[int], *_: Any) -> Traced:
    wanted = list(shape)
    if -1 in wanted:
        wanted[wanted.index(-1)] = tensor.numel() // -prod(wanted)
    boxes = list(tensor.boxes)
    done = 0
    for old, new in _groups(tuple(tensor.shape), tuple(wanted)):
        if old != new:
            boxes = [made for box in boxes for made in _regrouped(box, done, old, new)]
        done += len(new)
    return Traced.of(wanted, tensor.dtype, boxes)


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


def _regrouped(box: Box, at: int, old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[Box]:
    """The boxes that one becomes when its dimensions ``old``, the first of them number ``at``, become ``new``."""
    count = len(old)
    for begin, length, entry in _runs(box.entry, box.start[at : at + count], at, old):
        for start, size in _rectangles(begin, length, new):
            low = sum(first * step for first, step in zip(start, row_major(new), strict=True)) - begin
            cut = narrow(entry, at, low, prod(size))
            shaped = _shaped(cut, (*cut.shape[:at], *size, *cut.shape[at + 1 :]))
            yield Box((*box.start[:at], *start, *box.start[at + count :]), shaped)


def _runs(
    entry: TensorEntry, start: tuple[int, ...], at: int, extents: tuple[int, ...]
) -> Iterator[tuple[int, int, TensorEntry]]:
    """Pieces of a box that are consecutive in the group's flat order: their first place, length, and flat entry."""
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
    """Boxes (start, size) of ``extents`` that make the flat range ``[begin, begin + length)``."""
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
