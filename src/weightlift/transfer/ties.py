"""Tied names that are both in a checkpoint: what only their bytes can tell, before anything is assigned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from weightlift.errors import PlanError, Problem
from weightlift.options import LoadOptions
from weightlift.plan.parts import paired
from weightlift.plan.records import Action, Check, Decisions, Row
from weightlift.transfer.compare import Pair, same_values
from weightlift.transfer.subject import Bytes

_log = logging.getLogger("weightlift")


def conflicts_of(decisions: Decisions, source: Bytes, options: LoadOptions) -> list[Check]:
    """The checks of a plan that fail: tied names whose bytes differ."""
    return [check for check, same in _compared(decisions.checks, source, options) if not same]


def settled(decisions: Decisions, source: Bytes, options: LoadOptions, *, together: bool = True) -> Decisions:
    """The decisions once the bytes of tied names are known. Raises PlanError under ``strict`` where they differ.

    Without it, names with another value get a tensor of their own; those among them that agree stay one, if they are to
    stay ``together``. Where that can't be (views, one module under several names) the value of the name that was to
    provide is kept.
    """
    conflicts = conflicts_of(decisions, source, options)
    if not conflicts:
        return decisions
    if options.strict:
        raise PlanError(
            f"{decisions.source} does not fit {decisions.module}; nothing was changed",
            [_problem(check) for check in conflicts],
        )
    kept = [check for check in conflicts if not check.can_untie]
    for check in kept:
        _log.warning(
            "%s and %s are one tensor in %s but differ in %s: the value of %s is kept, that of %s is left out",
            check.fqn, check.other_fqn, decisions.module, decisions.source, check.fqn, check.other_fqn,
        )  # fmt: skip
    rows = {row.fqn: row for row in decisions.rows}
    target = 1 + max(row.target for row in decisions.rows)
    leaving = [check for check in conflicts if check.can_untie]
    for members in _agreeing(leaving, source, options) if together else [[check] for check in leaving]:
        first = members[0]
        _log.warning(
            "%s and %s are tied in %s but differ in %s: they are untied",
            first.fqn, " = ".join(check.other_fqn for check in members), decisions.module, decisions.source,
        )  # fmt: skip
        for check in members:
            rows[check.other_fqn] = _untied(rows[check.other_fqn], check, first, target)
        target += 1
    return replace(
        decisions,
        rows=tuple(rows[row.fqn] for row in decisions.rows),
        left_out=tuple((check.other_fqn, check.fqn) for check in kept),
    )


def _untied(row: Row, check: Check, first: Check, target: int) -> Row:
    """A row that leaves its tie: ``first`` loads the value of its new group."""
    if check is not first:
        return row._replace(action=Action.TIED, offer=None, parts=(), tied_to=first.other_fqn, target=target,
                            in_place=False, untied=True)  # fmt: skip
    return row._replace(action=Action.LOADED, offer=check.other, parts=check.other.parts, tied_to=None, target=target,
                        in_place=False, untied=True)  # fmt: skip


def _agreeing(conflicts: list[Check], source: Bytes, options: LoadOptions) -> list[list[Check]]:
    """Conflicts whose other names have one value among themselves, together; a tie of theirs is kept."""
    groups: list[list[Check]] = []
    for check in conflicts:
        pairs = [
            Check(group[0].other_fqn, group[0].other, check.other_fqn, check.other)
            for group in groups
            if group[0].fqn == check.fqn
        ]
        equal = [pair.fqn for pair, same in _compared(pairs, source, options) if same]
        home = next((group for group in groups if group[0].other_fqn in equal), None)
        if home is None:
            groups.append([check])
        else:
            home.append(check)
    return groups


def _compared(checks: Sequence[Check], source: Bytes, options: LoadOptions) -> list[tuple[Check, bool]]:
    """Each check, and whether its two values agree."""
    pairs: list[Pair] = []
    counts = []
    for check in checks:
        found = _pairs(check)
        counts.append(None if found is None else len(found))
        pairs += found or ()
    if not checks:
        return []
    equal = iter(same_values(pairs, source=source, options=options))
    return [
        (check, count is not None and sum(next(equal) for _ in range(count)) == count)
        for check, count in zip(checks, counts, strict=True)
    ]


def _pairs(check: Check) -> list[Pair] | None:
    """What to compare. None: not comparable, which counts as different."""
    found = paired(check.offer, check.other)
    return None if found is None else [Pair(one, other, check.lazily) for one, other in found]


def _problem(check: Check) -> Problem:
    entry = check.other.entry
    return Problem(
        f"tied to {check.fqn} in the module, but the checkpoint has two different values",
        key=check.other.key,
        fqn=check.other_fqn,
        file=entry.file,
        start=entry.start if entry.file else None,
        end=entry.end if entry.file else None,
        expected=f"the bytes of {check.offer.key}",
        hint="build the module untied, or pass strict=False to untie them"
        if check.can_untie
        else f"pass strict=False to keep the value of {check.fqn}",
    )
