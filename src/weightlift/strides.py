"""Arithmetic of strided views, in elements: no tensors, no memory."""

from __future__ import annotations

from collections.abc import Sequence


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * max(shape[dim], 1)
    return tuple(strides)


def is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements lie one after the other; strides of dimensions of size 1 say nothing."""
    step = 1
    for dim in range(len(shape) - 1, -1, -1):
        if shape[dim] != 1:
            if stride[dim] != step:
                return False
            step *= shape[dim] or 1
    return True


def can_fill(shape: tuple[int, ...], place: tuple[int, ...]) -> bool:
    """Whether a value of ``shape`` goes into a place of that shape. A vector of one element does into a scalar: torch
    itself accepts that, from checkpoints of version 0.3."""
    return shape == place or (place == () and shape == (1,))


def has_overlap(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether two elements may share memory (expanded and sliding-window views)."""
    if 0 in shape:
        return False
    span = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step < span:
                return True
            span += (size - 1) * step
    return False


def is_expanded(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements along a dimension are one: torch writes to no such view, as it does to sliding windows."""
    return 0 not in shape and any(size > 1 and step == 0 for size, step in zip(shape, stride, strict=True))


def span_elements(sizes: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one of a non-empty view, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(sizes, stride, strict=True))


def interval(shape: Sequence[int], stride: Sequence[int], offset: int) -> tuple[int, int]:
    """Where a view begins and ends (half open); nowhere without elements."""
    return (0, 0) if 0 in shape else (offset, offset + span_elements(shape, stride))


def joined(
    shape: Sequence[int], first: Sequence[int], second: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Two views of one shape, with their dimensions in the order of the first one's memory and as few as can be.

    The pairs of elements stay the same. Nothing is done about a scalar or a view without elements.
    """
    if 0 in shape:
        return tuple(shape), tuple(first), tuple(second)
    found: list[list[int]] = []
    for extent, a, b in sorted(zip(shape, first, second, strict=True), key=lambda dim: (-dim[1], -dim[2])):
        if extent == 1:
            continue
        if found and found[-1][1] == a * extent and found[-1][2] == b * extent:
            found[-1] = [found[-1][0] * extent, a, b]
        else:
            found.append([extent, a, b])
    sizes, one, two = zip(*found, strict=True) if found else ((), (), ())
    return tuple(sizes), tuple(one), tuple(two)
