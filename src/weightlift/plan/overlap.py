"""Different tensors of a module that lie in the same memory: views of a weight, pieces of one buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from weightlift.checkpoint.entry import TensorEntry
from weightlift.deferred.inventory import TensorSpec
from weightlift.errors import Problem
from weightlift.plan.parts import box_of, overlap, within
from weightlift.plan.prefixes import quoted
from weightlift.plan.problems import dropping
from weightlift.plan.records import Offer
from weightlift.plan.regions import Region
from weightlift.strides import has_overlap, interval, is_row_major, row_major, span_elements

Fitting = Mapping[int, tuple[TensorSpec, Offer]]


def share_memory(tensors: Sequence[TensorSpec]) -> bool:
    """Whether the byte ranges of any two of them, of one storage, meet."""
    reached = -1
    for start, end in sorted(_range(item) for item in tensors):
        if start < reached:
            return True
        reached = max(reached, end)
    return False


def overlays(
    ties: Sequence[Sequence[TensorSpec]], fitting: Fitting, problems: list[Problem]
) -> dict[int, tuple[TensorSpec, Offer]]:
    """For each group of a storage whose bytes a larger, offered one provides too: that one, and its part of the offer.

    ``fitting`` is the offer of each group that has one. Only one of two tensors may be written; the other is compared
    with it. Where that can't be done a problem is added.
    """
    if len(fitting) < 2 or not share_memory([item for item, _ in fitting.values()]):
        return {}
    found: dict[int, tuple[TensorSpec, Offer]] = {}
    written: list[tuple[TensorSpec, Offer]] = []
    for number in sorted(fitting, key=lambda number: _says_less(ties[number][0])):
        item, offer = fitting[number]
        under = [pair for pair in written if _overlap(pair[0], item)]
        if not under:
            written.append((item, offer))
            continue
        part = _part_of(*under[0], item) if len(under) == 1 else None
        if part is None:
            problems.append(_both(item, offer, under[0][0]))
        found[number] = under[0][0], part or under[0][1]
    return found


def _says_less(item: TensorSpec) -> tuple[bool, int, bool, tuple[bool, bool]]:
    """The larger of two tensors can say what the other one is, unless elements of it share memory; of equals the one
    that shows the memory as it lies."""
    return has_overlap(item.shape, item.stride), -item.nbytes, not is_row_major(item.shape, item.stride), item.lazily


def _range(item: TensorSpec) -> tuple[int, int]:
    start, end = (0, 0) if item.lazy else interval(item.shape, item.stride, item.offset)
    return start * item.dtype.itemsize, end * item.dtype.itemsize


def _overlap(a: TensorSpec, b: TensorSpec) -> bool:
    (start, end), (other_start, other_end) = _range(a), _range(b)
    if start >= other_end or other_start >= end:
        return False
    if a.dtype != b.dtype:
        return True
    return overlap([Region(item.shape, item.stride, item.offset) for item in (a, b)])


def _part_of(whole: TensorSpec, offer: Offer, item: TensorSpec) -> Offer | None:
    """What ``offer``, the value of ``whole``, says about ``item``; None where it does not say all of it."""
    if whole.dtype != item.dtype:
        return None
    region = Region(item.shape, item.stride, item.offset - whole.offset)
    if region.offset < 0 or region.offset + span_elements(region.shape, region.stride) > whole.numel:
        return None
    if offer.parts:
        return box_of(offer, region) if is_row_major(whole.shape, whole.stride) else None
    laid = _as_it_lies(whole, replace(offer.entry, shape=whole.shape) if not whole.shape else offer.entry)
    entry = None if laid is None else within(laid, region)
    return None if entry is None else offer._replace(entry=entry)


def _as_it_lies(whole: TensorSpec, entry: TensorEntry) -> TensorEntry | None:
    """The value of ``whole`` with its dimensions in the order of the memory, of which it fills a run; None: it does
    not."""
    if is_row_major(whole.shape, whole.stride):
        return entry
    order = sorted(range(len(whole.shape)), key=lambda dim: (-whole.stride[dim], whole.shape[dim] == 1))
    shape = tuple(whole.shape[dim] for dim in order)
    if not is_row_major(shape, [whole.stride[dim] for dim in order]):
        return None
    stride = row_major(entry.shape) if entry.stride is None else entry.stride
    return replace(entry, shape=shape, stride=tuple(stride[dim] for dim in order))


def _both(item: TensorSpec, offer: Offer, other: TensorSpec) -> Problem:
    return Problem(
        f"it shares memory with {other.fqn} in the module, and the checkpoint has both",
        key=offer.key,
        fqn=item.fqn,
        file=offer.entry.file,
        hint="pass strict=False and drop one of the two, for instance this:"
        f" {dropping(f'key == {quoted(offer.key)}')}",
    )
