"""The frozen records that a plan hands to the engine: what to fill, from where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from weightlift.checkpoint.entry import TensorEntry
from weightlift.plan.records import Part


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
