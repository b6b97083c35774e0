"""Tied names that are both in a checkpoint: what only their bytes can tell, before anything is assigned."""

from __future__ import annotations

import logging
from dataclasses import replace

from weightlift.errors import PlanError, Problem
from weightlift.options import LoadOptions
from weightlift.plan.records import Action, Check, Decisions, Row
from weightlift.transfer.compare import same_values
from weightlift.transfer.subject import Bytes

_log = logging.getLogger("weightlift")


def _conflicts(decisions: Decisions, source: Bytes, options: LoadOptions) -> list[Check]:
    """The checks that fail: tied names whose bytes differ."""
    if not decisions.checks:
        return []
    pairs = [(check.offer.entry, check.other.entry) for check in decisions.checks]
    equal = same_values(
        pairs,
        files=source.files,
        tensors=source.tensors,
        workers=options.workers,
        memory_budget_bytes=options.memory_budget_bytes,
        cancel=options.cancel,
    )
    return [check for check, same in zip(decisions.checks, equal, strict=True) if not same]


def settled(decisions: Decisions, source: Bytes, options: LoadOptions) -> tuple[Row, ...]:
    """Tied names with different values: refused under ``strict``, else each gets its own tensor."""
    conflicts = _conflicts(decisions, source, options)
    if not conflicts:
        return decisions.rows
    if options.strict:
        raise PlanError(
            f"{decisions.source} does not fit {decisions.module}; nothing was changed",
            [
                Problem(
                    "tied in the module, but the checkpoint has two different values",
                    key=check.other.key,
                    fqn=check.other_fqn,
                    file=check.other.entry.file,
                    start=check.other.entry.start if check.other.entry.file else None,
                    end=check.other.entry.end if check.other.entry.file else None,
                    expected=f"the bytes of {check.offer.key}",
                    hint="build the module untied, or pass strict=False to untie them",
                )
                for check in conflicts
            ],
        )
    untied = {check.other_fqn: check for check in conflicts}
    for check in conflicts:
        _log.warning(
            "%s and %s are tied in %s but differ in %s: they are untied",
            check.fqn, check.other_fqn, decisions.module, decisions.source,
        )  # fmt: skip
    first_free = 1 + max(row.target for row in decisions.rows)
    return tuple(
        replace(
            row,
            action=Action.LOADED,
            offer=untied[row.fqn].other,
            tied_to=None,
            target=first_free + number,
            in_place=False,
        )
        if row.fqn in untied
        else row
        for number, row in enumerate(decisions.rows)
    )
