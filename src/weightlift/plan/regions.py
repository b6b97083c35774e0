"""Strided views of what lies in a checkpoint and of what is to be filled: pure arithmetic, no tensor is touched.

``narrow``, ``select``, ``permute``, ``transpose`` and ``reshape`` mean what they mean in torch, for entries of a
checkpoint and for regions of a destination alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

from weightlift.checkpoint.entry import TensorEntry
from weightlift.strides import is_row_major, row_major, span_elements


@dataclass(frozen=True, slots=True)
class Region:
    """A strided view of a row-major tensor; ``stride`` and ``offset`` count elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0


View = TypeVar("View", TensorEntry, Region)


def whole(shape: Sequence[int]) -> Region:
    """The region that is a whole tensor of ``shape``."""
    return Region(tuple(shape), row_major(shape), 0)


def narrow(view: View, dim: int, start: int, length: int) -> View:
    """``view.narrow(dim, start, length)``. Raises ValueError outside the view."""
    found: Region = region_of(view)
    dim = _dim(found, dim)
    if not (start >= 0 and length >= 0 and start + length <= found.shape[dim]):
        raise ValueError(f"narrow({dim}, {start}, {length}) of a view of shape {found.shape}")
    shape = (*found.shape[:dim], length, *found.shape[dim + 1 :])
    return as_view(view, Region(shape, found.stride, found.offset + start * found.stride[dim]))


def select(view: View, dim: int, index: int) -> View:
    """``view.select(dim, index)``: one dimension fewer. Raises ValueError outside the view."""
    found: Region = region_of(view)
    dim = _dim(found, dim)
    if not 0 <= index < found.shape[dim]:
        raise ValueError(f"select({dim}, {index}) of a view of shape {found.shape}")
    shape = (*found.shape[:dim], *found.shape[dim + 1 :])
    stride = (*found.stride[:dim], *found.stride[dim + 1 :])
    return as_view(view, Region(shape, stride, found.offset + index * found.stride[dim]))


def every(view: View, dim: int, start: int, step: int) -> View:
    """``view[start::step]`` along ``dim``, with a positive step. Raises ValueError outside the view."""
    found: Region = region_of(view)
    dim = _dim(found, dim)
    if step < 1 or not 0 <= start <= found.shape[dim]:
        raise ValueError(f"[{start}::{step}] along {dim} of a view of shape {found.shape}")
    shape = (*found.shape[:dim], len(range(start, found.shape[dim], step)), *found.shape[dim + 1 :])
    stride = (*found.stride[:dim], found.stride[dim] * step, *found.stride[dim + 1 :])
    return as_view(view, Region(shape, stride, found.offset + start * found.stride[dim]))


def permute(view: View, dims: Sequence[int]) -> View:
    """``view.permute(dims)``. Raises ValueError when ``dims`` is not a permutation."""
    found: Region = region_of(view)
    order = [_dim(found, dim) for dim in dims]
    if sorted(order) != list(range(len(found.shape))):
        raise ValueError(f"permute{tuple(dims)} of a view of shape {found.shape}")
    shape = tuple(found.shape[dim] for dim in order)
    return as_view(view, Region(shape, tuple(found.stride[dim] for dim in order), found.offset))


def transpose(view: View, first: int, second: int) -> View:
    """``view.transpose(first, second)``."""
    found: Region = region_of(view)
    order = list(range(len(found.shape)))
    first, second = _dim(found, first), _dim(found, second)
    order[first], order[second] = order[second], order[first]
    return permute(view, order)


def reshape(view: View, shape: Sequence[int]) -> View | None:
    """``view.view(shape)``; None where only a copy has that shape (torch's ``view`` raises there). One extent may be
    -1. Raises ValueError when the numbers of elements differ.
    """
    found: Region = region_of(view)
    wanted = _inferred(shape, prod(found.shape))
    if 0 in wanted:
        return as_view(view, Region(wanted, row_major(wanted), found.offset))
    blocks = _blocks(found)
    stride = []
    size, step = blocks.pop(0) if blocks else (1, 1)
    for extent in wanted:
        if size == 1 and extent > 1:
            size, step = blocks.pop(0)
        if size % extent:
            return None
        size //= extent
        stride.append(size * step)
    return as_view(view, Region(wanted, tuple(stride), found.offset))


def region_of(view: TensorEntry | Region) -> Region:
    """A view as a region; an entry's begins at 0."""
    if isinstance(view, Region):
        return view
    return Region(view.shape, row_major(view.shape) if view.stride is None else view.stride, 0)


def as_view(view: View, region: Region) -> View:
    """``region`` as a view of the kind of ``view``, which it is counted from the start of."""
    if isinstance(view, Region):
        return region
    itemsize = view.dtype.itemsize
    elements = 0 if 0 in region.shape else span_elements(region.shape, region.stride)
    start = view.start + (region.offset * itemsize if elements else 0)
    stride = None if is_row_major(region.shape, region.stride) or not elements else region.stride
    return replace(view, shape=region.shape, start=start, end=start + elements * itemsize, stride=stride)


def _dim(view: Region, dim: int) -> int:
    if not -len(view.shape) <= dim < len(view.shape):
        raise ValueError(f"dimension {dim} of a view of shape {view.shape}")
    return dim % len(view.shape)


def _inferred(shape: Sequence[int], numel: int) -> tuple[int, ...]:
    known = prod(extent for extent in shape if extent != -1)
    if list(shape).count(-1) == 1 and known and numel % known == 0:
        shape = [numel // known if extent == -1 else extent for extent in shape]
    if min(shape, default=0) < 0 or prod(shape) != numel:
        raise ValueError(f"{numel} elements do not have the shape {tuple(shape)}")
    return tuple(shape)


def _blocks(view: Region) -> list[tuple[int, int]]:
    """(elements, stride of the last) of each run of dimensions that lie evenly; extents of 1 left out."""
    blocks: list[tuple[int, int]] = []
    for extent, step in zip(view.shape, view.stride, strict=True):
        if extent == 1:
            continue
        if blocks and blocks[-1][1] == step * extent:
            blocks[-1] = (blocks[-1][0] * extent, step)
        else:
            blocks.append((extent, step))
    return blocks


def joined(view: Region) -> Region:
    """The same elements in the order of memory, with as few dimensions as can be."""
    order = sorted(range(len(view.shape)), key=lambda dim: -view.stride[dim])
    blocks = _blocks(Region(tuple(view.shape[dim] for dim in order), tuple(view.stride[dim] for dim in order)))
    return Region(tuple(size for size, _ in blocks), tuple(step for _, step in blocks), view.offset)
