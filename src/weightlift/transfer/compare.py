"""The plan's checks: do two entries hold the same values? Read in bounded pieces, the first difference ends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from weightlift import strides
from weightlift.ambient import outside_modes
from weightlift.checkpoint.entry import TensorEntry
from weightlift.dtypes import LARGEST_ELEMENT_BYTES
from weightlift.errors import CheckpointChanged, LoadCancelled, Problem, TransferError
from weightlift.lazy_views import shown_as
from weightlift.options import LoadOptions
from weightlift.transfer import chunks
from weightlift.transfer.memory import Staging, StagingPool, bits, in_memory
from weightlift.transfer.pool import Pool
from weightlift.transfer.progress import Reporter
from weightlift.transfer.sources import FileSource, OpenFiles, Source
from weightlift.transfer.subject import Bytes

_PLAIN = (False, False)
_UNIT_BYTES = 32 << 20
_WIDE = torch.int64


class Pair(NamedTuple):
    """Two entries; ``lazily``: whether the second one is to be conjugated, and negated, before it is compared."""

    one: TensorEntry
    other: TensorEntry
    lazily: tuple[bool, bool] = _PLAIN


def same_values(
    pairs: Sequence[Pair],
    *,
    source: Bytes,
    options: LoadOptions,
    store: Source | None = None,
) -> list[bool]:
    """For every pair whether shapes and values agree, bit by bit, so that equal NaNs are equal and -0.0 is not 0.0.

    With two dtypes both are converted to a common one first; there any NaN equals any NaN. The same range of the same
    file is not read.

    Raises:
        CheckpointChanged, TransferError, LoadCancelled, KeyboardInterrupt: as `run`; nothing is ever written.
    """
    known = {file.path: file for file in source.files}
    store = store or FileSource()
    used = dict.fromkeys(entry.file for pair in pairs for entry in pair[:2] if entry.file is not None)
    problems = [problem for path in used if (problem := store.check(known[path])) is not None]
    if problems:
        raise CheckpointChanged("the checkpoint changed since it was opened", problems)
    results: list[bool | None] = [_without_reading(pair) for pair in pairs]
    open_pairs = [index for index, result in enumerate(results) if result is None]
    units = [(index, unit) for index in open_pairs for unit in _units(pairs[index])]
    total_bytes = sum(_bytes(unit) for _, unit in units)
    limit = chunks.limits(total_bytes, options.workers, options.memory_budget_bytes)
    uses = [entry.file for _, unit in units for entry in unit[:2] if entry.file is not None]
    reader = _Reader(OpenFiles(store, known, uses), source.tensors, limit, options.cancel)
    differ: set[int] = set()

    def compare(item: tuple[int, Pair]) -> int:
        index, unit = item
        if index in differ:
            reader.skip(unit)
        elif not reader.same(unit):
            differ.add(index)
        return _bytes(unit)

    silent = Reporter(False, total_bytes)
    pool: Pool[tuple[int, Pair]] = Pool(
        units, (), compare, workers=limit.workers, reporter=silent, cancel=options.cancel
    )
    try:
        with outside_modes():
            pool.run()
    finally:
        reader.close()
    return [index not in differ if result is None else result for index, result in enumerate(results)]


def _without_reading(pair: Pair) -> bool | None:
    """The answer that the headers alone give, if they do."""
    a, b, lazily = pair
    if a.shape != b.shape:
        return False
    if a.numel == 0:
        return True
    # A tensor in memory has no place but its key.
    a_place, b_place = a.file or a.key, b.file or b.key
    if lazily == _PLAIN and (a_place, a.start, a.dtype, _stride(a)) == (b_place, b.start, b.dtype, _stride(b)):
        return True
    return None


def _units(pair: Pair) -> Iterator[Pair]:
    """A pair in parts for several workers, where both lie in files as one run of bytes."""
    a, b, lazily = pair
    if a.file is None or b.file is None or a.stride is not None or b.stride is not None:
        yield pair
        return
    step = max(_UNIT_BYTES // max(a.dtype.itemsize, b.dtype.itemsize), 1)
    for low in range(0, a.numel, step):
        high = min(low + step, a.numel)
        yield Pair(_cut(a, low, high), _cut(b, low, high), lazily)


def _cut(entry: TensorEntry, low: int, high: int) -> TensorEntry:
    size = entry.dtype.itemsize
    start = entry.start
    return replace(entry, shape=(high - low,), start=start + low * size, end=start + high * size)


def _stride(entry: TensorEntry) -> tuple[int, ...]:
    return strides.row_major(entry.shape) if entry.stride is None else entry.stride


def _bytes(pair: Pair) -> int:
    return pair.one.nbytes + pair.other.nbytes


class _Reader:
    """Compares pairs; `same` is called from all workers at once, and takes two staging blocks at most."""

    def __init__(
        self,
        files: OpenFiles,
        tensors: Mapping[str, torch.Tensor],
        limit: chunks.Limits,
        cancel: threading.Event | None,
    ) -> None:
        self._files = files
        self._tensors = tensors
        self._block_bytes = limit.block_bytes
        self._staging = StagingPool(limit.block_bytes, 2 * limit.workers)
        self._cancel = cancel

    def close(self) -> None:
        """Close files that an error left open."""
        self._files.close()

    def same(self, pair: Pair) -> bool:
        """Read both, a part at a time, until they differ."""
        a, b, _ = pair
        # Converting to a common dtype makes up to 16 bytes of an element.
        spread = 1 if a.dtype == b.dtype else LARGEST_ELEMENT_BYTES // min(a.dtype.itemsize, b.dtype.itemsize)
        block_bytes = max(self._block_bytes // spread, LARGEST_ELEMENT_BYTES)
        blocks = self._staging.take(), self._staging.take()
        try:
            equal = all(self._same_part(pair, blocks, *part) for part in _parts(a, b, block_bytes))
        finally:
            for block in blocks:
                self._staging.give(block)
        self.skip(pair)
        return equal

    def skip(self, pair: Pair) -> None:
        """Say that a pair needs its files no more."""
        for entry in pair[:2]:
            if entry.file is not None:
                self._files.done(entry.file)

    def _same_part(
        self, pair: Pair, blocks: tuple[Staging, Staging], starts: tuple[int, ...], sizes: tuple[int, ...]
    ) -> bool:
        if self._cancel is not None and self._cancel.is_set():
            raise LoadCancelled
        one = self._part(pair.one, starts, sizes, blocks[0])
        other = self._part(pair.other, starts, sizes, blocks[1])
        return _equal(one, shown_as(other, pair.lazily).resolve_conj().resolve_neg())

    def _part(
        self, entry: TensorEntry, starts: tuple[int, ...], sizes: tuple[int, ...], block: Staging
    ) -> torch.Tensor:
        if entry.file is None:
            part = in_memory(entry, self._tensors)
            if len(starts) != part.dim():
                part = part.reshape(-1)
            for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
                part = part.narrow(dim, start, size)
            return part.cpu()
        stride = _stride(entry) if len(starts) == len(entry.shape) and entry.stride is not None else ()
        stride = stride or strides.row_major(entry.shape if len(starts) == len(entry.shape) else (entry.numel,))
        itemsize = entry.dtype.itemsize
        low = entry.start + sum(a * b for a, b in zip(starts, stride, strict=True)) * itemsize
        high = low + strides.span_elements(sizes, stride) * itemsize
        self._read(entry, entry.file, block.view[: high - low], low)
        return block.strided(entry.dtype, 0, sizes, stride)

    def _read(self, entry: TensorEntry, file: Path, view: memoryview, start: int) -> None:
        done, end = 0, start + len(view)
        try:
            handle = self._files.get(file)
            while done < len(view):
                count = handle.readinto(view[done:], start + done)
                if count <= 0:
                    raise EOFError(f"the file ends at byte {start + done:,}")
                done += count
        except (OSError, EOFError) as error:
            if isinstance(error, CheckpointChanged):
                raise
            problem = Problem(f"reading failed: {error}", key=entry.key, file=file, start=start, end=end)
            raise TransferError("comparing tied weights failed", [problem]) from error


def _parts(a: TensorEntry, b: TensorEntry, block_bytes: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of the common shape such that a block holds the bytes that either entry needs for one."""
    if a.stride is None and b.stride is None:
        elements = max(block_bytes // max(a.dtype.itemsize, b.dtype.itemsize), 1)
        yield from chunks.boxes((a.numel,), (1,), elements)
        return
    for starts, sizes in chunks.boxes(a.shape, _stride(a), max(block_bytes // a.dtype.itemsize, 1)):
        for inner, part in chunks.boxes(sizes, _stride(b), max(block_bytes // b.dtype.itemsize, 1)):
            yield tuple(x + y for x, y in zip(starts, inner, strict=True)), part


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype == b.dtype:
        return _equal_bits(a, b)
    common = _common(a.dtype, b.dtype)
    a, b = a.to(common), b.to(common)
    if _equal_bits(a, b):
        return True
    if common.is_complex:
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    both_nan = (a != a) & (b != b)
    zeros_differ = (a == 0) & (a.signbit() != b.signbit())
    return bool((((a == b) & ~zeros_differ) | both_nan).all())


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype == torch.complex128:
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = a.view(bits(a.dtype)), b.view(bits(b.dtype))
    if a.is_contiguous() and b.is_contiguous():  # torch compares wide integers several times as fast as narrow ones
        a, b = a.view(-1), b.view(-1)
        whole = a.nbytes // _WIDE.itemsize * _WIDE.itemsize // a.element_size()
        if all(item.data_ptr() % _WIDE.itemsize == 0 for item in (a, b)):
            try:
                head = torch.equal(a[:whole].view(_WIDE), b[:whole].view(_WIDE))
            except RuntimeError:  # the storage begins at an odd place
                return torch.equal(a, b)
            return head and torch.equal(a[whole:], b[whole:])
    return torch.equal(a, b)


def _common(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    try:
        return torch.promote_types(a, b)
    except RuntimeError:  # the small floats promote with nothing
        return torch.float64 if torch.float64 in (a, b) else torch.float32
