"""From jobs to the requests that the chunker cuts: geometry, in as few dimensions as can be."""

from __future__ import annotations

from collections.abc import Iterator

from weightlift import strides
from weightlift.checkpoint.entry import TensorEntry, nbytes_of
from weightlift.transfer.chunks import Request
from weightlift.transfer.execute import Target
from weightlift.transfer.jobs import Job

_Stride = tuple[int, ...] | None


def requests_of(index: int, job: Job, target: Target) -> Iterator[Request]:
    """What the chunker needs to know of a job: one request, or one a part."""
    if not job.parts:
        yield _request(index, job.entry, target)
        return
    direct = target.same and target.device is None
    place = "cpu" if target.device is None else str(target.device)
    itemsize = job.entry.dtype.itemsize
    plain: dict[tuple[tuple[int, ...], tuple[int, ...]], bool] = {}
    for part in job.parts:
        entry, shape = part.entry, part.shape
        if 0 in shape:
            continue
        consecutive = plain.get((shape, part.stride))
        if consecutive is None:
            consecutive = plain[shape, part.stride] = strides.is_row_major(shape, part.stride)
        if consecutive and entry.stride is None:
            src = dst = None
        else:
            shape, src, dst = _joined(shape, entry.stride, part.stride)
        yield Request(
            index, entry.file, entry.start, itemsize, nbytes_of(entry), shape, src, dst, direct, place, part.offset
        )


def _joined(shape: tuple[int, ...], src: _Stride, dst: _Stride) -> tuple[tuple[int, ...], _Stride, _Stride]:
    """As few dimensions as can be; None for what lies in row-major order."""
    default = strides.row_major(shape)
    shape, one, two = strides.joined(shape, default if src is None else src, default if dst is None else dst)
    return (
        shape,
        None if strides.is_row_major(shape, one) else one,
        None if strides.is_row_major(shape, two) else two,
    )


def _request(index: int, entry: TensorEntry, target: Target) -> Request:
    memory, written = target.memory, target.tensor
    src = entry.stride if memory is None else memory.stride()
    dst = None if written.is_contiguous() else written.stride()
    shape = entry.shape
    if src is not None or dst is not None:
        shape, src, dst = _joined(shape, src or None, dst or None)
    direct = memory is None and target.same and target.device is None
    place = "cpu" if target.device is None else str(target.device)
    return Request(
        index, entry.file, entry.start, entry.dtype.itemsize, nbytes_of(entry), shape, src, dst, direct, place
    )
