"""Names that do not meet for one reason: told as one problem with its remedy, instead of as two for every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from weightlift.errors import Problem
from weightlift.options import KeyMapping
from weightlift.plan.prefixes import Prefix, find_prefix, quoted
from weightlift.plan.problems import dropping
from weightlift.plan.records import Row, Unexpected
from weightlift.plan.renamings import Renaming, find_renaming

_MANY = 5  # fewer are better listed
_FEW = 20  # of which more are too long a line


def find(
    rows: Sequence[Row], unexpected: Sequence[Unexpected], present: Mapping[str, str], given: KeyMapping | None
) -> Prefix | Renaming | None:
    """What is behind names that do not meet, if it is one thing. ``present``: key → name of what the checkpoint has."""
    prefix = find_prefix(rows, {item.name for item in unexpected})
    if prefix is not None:
        return prefix
    extra = {item.key for item in unexpected}
    right = {**present, **{row.offer.key: row.offer.name for row in rows if row.offer is not None}}
    return find_renaming(rows, unexpected, {key: name for key, name in right.items() if key not in extra}, given)


def in_short(
    missing: Sequence[Problem],
    unexpected: Sequence[tuple[Unexpected, Problem]],
    rows: Sequence[Row],
    present: Callable[[], Mapping[str, str]],
    key_mapping: KeyMapping | None,
) -> list[Problem]:
    """The problems of names that do not meet; where one thing is behind them, a problem that says so before those that
    follow from it. ``present`` gives key → name of what the checkpoint has."""
    items = [item for item, _ in unexpected]
    remedy = find(rows, items, present(), key_mapping) if missing and items else None
    if remedy is None:
        beside = None if missing or key_mapping is not None else _beside(items, rows, present)
        problems = [problem for _, problem in unexpected]
        if beside is None:
            return [*missing, *problems]
        if len(problems) == 1:
            return [replace(problems[0], hint=beside.hint)]
        return [beside, *(replace(problem, implied=True) for problem in problems)]
    known = {row.fqn for row in rows}.union(problem.fqn for problem in missing if problem.fqn is not None)
    if isinstance(remedy, Prefix):
        placed = {remedy.of_checkpoint(fqn): fqn for fqn in known}
    else:
        placed = {name: fqn for name, fqn in remedy.placed.items() if fqn in known}
    met = {placed[item.name] for item in items if item.name in placed}.union(remedy.names)
    return [
        Problem(str(remedy), hint=remedy.hint(key_mapping)),
        *(replace(problem, implied=problem.fqn in met) for problem in missing),
        *(replace(problem, implied=item.name in placed) for item, problem in unexpected),
    ]


def _beside(
    items: Sequence[Unexpected], rows: Sequence[Row], present: Callable[[], Mapping[str, str]]
) -> Problem | None:
    """Where nothing is missing, and all that is too much lies under one part that the module has not: averaged weights
    beside the others, an optimiser's state. Or is no tensors, as what a trainer keeps."""
    keys = [item.key for item in items if item.entry is None]
    if len(items) == len(keys) <= _FEW:
        if not keys or not set(keys) <= present().keys():  # but made up by a hook
            return None
        what = f"the module has no place for {len(keys)} values beside the tensors: {', '.join(keys)}"
        listed = ", ".join(map(quoted, keys))
        return _to_be_dropped(what, f"key in {{{listed}}}" if len(keys) > 1 else f"key == {listed}")
    names = [item.name for item in items]
    first = names[0].partition(".")[0] + "." if len(names) >= _MANY else ""
    if not first or not all(name.startswith(first) for name in names) or any(row.fqn.startswith(first) for row in rows):
        return None
    what = f"all {len(names)} keys that the module has no place for begin with {first!r}"
    return _to_be_dropped(what, f"key.startswith({quoted(first)})")


def _to_be_dropped(what: str, condition: str) -> Problem:
    return Problem(what, hint=f"pass strict=False to leave that out, or drop it: {dropping(condition)}")
