"""From what a checkpoint offers to a model of another library to what is done with each of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from weightlift.integrations.file_strides import as_in_files
from weightlift.integrations.misfits import refuse_shared
from weightlift.options import LoadOptions
from weightlift.plan.match import Supply, match
from weightlift.plan.records import Decisions, Offer, Row
from weightlift.transfer.subject import Subject


def decide(subject: Subject, supply: Supply, options: LoadOptions, replaced: Mapping[str, Offer]) -> Decisions:
    """Match names. ``replaced`` are offers that the library puts in the model's place, as the file has them. Raises
    `NotNative` where tensors that share memory can't all be filled."""
    decisions = match(subject.inventory.spec(subject.record_at), supply, options)
    refuse_shared(decisions, subject.inventory.slots)
    return as_in_files(decisions, subject, replaced)


def placed(decisions: Decisions, dtype: Callable[[Row], torch.dtype], devices: Mapping[str, str]) -> Decisions:
    """The decisions with the library's own choice of dtypes, and of devices by name."""

    def row_for(row: Row) -> Row:
        wanted = dtype(row), devices.get(row.fqn, row.device)
        return row if wanted == (row.dtype, row.device) else row._replace(dtype=wanted[0], device=wanted[1])

    return replace(decisions, rows=tuple(map(row_for, decisions.rows)))
