"""The frozen records that a plan hands to the engine: what to fill, from where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch

from weightlift.checkpoint.entry import TensorEntry
from weightlift.deferred.replay import Replay
from weightlift.errors import Problem, TransferError
from weightlift.plan.records import Part, Row
from weightlift.strides import is_row_major


class Job(NamedTuple):
    """One tensor to produce (``into`` is None) or to fill in place (``into``: same shape, any strides).

    ``fqn`` is for messages; several jobs may have one, when each fills a region of the same tensor. ``fresh``: ``into``
    is memory that nobody has seen yet, so that writing it is not reported. No two jobs of a run may have ``into``
    tensors that overlap: every destination byte has exactly one writer.

    With ``parts`` these are read instead of ``entry``, which says the shape and dtype that they make up; ``into`` is
    contiguous then, they lie in files and fill it without overlap and without a hole.
    """

    fqn: str
    entry: TensorEntry
    dtype: torch.dtype
    device: torch.device
    into: torch.Tensor | None = None
    fresh: bool = False
    parts: tuple[Part, ...] = ()

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """What is read."""
        return tuple([part.entry for part in self.parts]) if self.parts else (self.entry,)


@dataclass(frozen=True, slots=True)
class Task:
    """Work beside the pieces: running a recorded initialiser ("init"), or hashing a file ("hash"). ``nbytes`` is its
    share of the progress."""

    fqn: str
    nbytes: int
    run: Callable[[], None]
    kind: str = "init"


def initialise(replay: Replay, fqn: str, seed: int) -> None:
    """Run a recorded initialiser. Raises TransferError, which names the call that failed."""
    try:
        with torch.no_grad():
            replay.run(seed)
    except Exception as error:
        what = f"its initialiser failed in {replay.failed_in}: {type(error).__name__}: {error}"
        hint = "with defer=False the constructor itself runs it, and raises where it stands"
        raise TransferError("loading failed", [Problem(what, fqn=fqn, hint=hint)]) from error


def entry_in_files(row: Row) -> TensorEntry | None:
    """What the parts of a row make up, if all lie in files under one dtype."""
    dtype = row.parts[0].entry.dtype
    if any(part.entry.file is None or part.entry.dtype != dtype for part in row.parts) or 0 in row.shape:
        return None
    key = row.parts[0].key if row.offer is None else row.offer.key
    return TensorEntry(key, row.shape, dtype, None, 0, prod(row.shape) * dtype.itemsize)


def one_entry(row: Row) -> TensorEntry | None:
    """What is read for a row whose value is one tensor of the checkpoint as it lies there, in any shape."""
    if row.parts:
        (entry, *more), part = row.entries, row.parts[0]
        if more or entry.stride is not None or not is_row_major(part.shape, part.stride) or part.offset:
            return None
    else:
        assert row.offer is not None
        entry = row.offer.entry
    if entry.shape == row.shape:
        return entry
    return replace(entry, shape=row.shape, stride=None)  # also a vector of one element, which `can_fill` a scalar
