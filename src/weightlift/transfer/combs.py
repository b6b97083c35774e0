"""Views whose bytes lie in many short runs, such as a rank's columns of a matrix: which ranges of the file to read.

Reading across the gaps moves bytes that nobody wants: with eight ranks that keep a column block each, eight times the
matrix. Reading every run by itself costs a call. A gap is read along while that is cheaper than the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod

from weightlift.strides import span_elements

# A warm read moves this much in about the time of one call (measured: 2 to 3 microseconds on a cached file).
SMALLEST_GAP_BYTES = 8 << 10

Range = tuple[int, int]


def run_dims(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many leading dims a view has outside its contiguous runs: the last ``len(shape) - n`` are one run."""
    step = 1
    for dim in range(len(shape) - 1, -1, -1):
        if shape[dim] != 1 and stride[dim] != step:
            return dim + 1
        step *= shape[dim]
    return 0


def has_gaps(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> bool:
    """Whether the runs of a non-empty view lie so far apart that each is to be read by itself.

    Only views in row-major order count, and runs in the order of the file.
    """
    outer = run_dims(shape, stride)
    if outer == 0 or any(a < b for a, b in pairwise(stride)):
        return False
    inner = next((dim for dim in range(outer - 1, -1, -1) if shape[dim] > 1), None)
    if inner is None:
        return False
    return (stride[inner] - prod(shape[outer:])) * itemsize > SMALLEST_GAP_BYTES


def ranges_of(start: int, shape: Sequence[int], stride: Sequence[int], itemsize: int) -> Iterator[Range]:
    """The byte ranges of the runs of a view that begins at byte ``start``, half open, in order."""
    outer = run_dims(shape, stride)
    run_bytes = prod(shape[outer:]) * itemsize
    for index in product(*(range(extent) for extent in shape[:outer])):
        low = start + sum(a * b for a, b in zip(index, stride)) * itemsize
        yield low, low + run_bytes


def cost(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> tuple[int, int]:
    """(requests, bytes read) of a non-empty view, gaps that are read along included; neighbours apart."""
    if has_gaps(shape, stride, itemsize):
        return prod(shape[: run_dims(shape, stride)]), prod(shape) * itemsize
    return 1, span_elements(shape, stride) * itemsize
