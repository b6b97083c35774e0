"""A prefix on all names of a checkpoint, or of a module: what training frameworks wrap around a model. Told as one
problem with its remedy, instead of as two for every tensor.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from weightlift.errors import Problem
from weightlift.options import KeyMapping
from weightlift.plan.records import Row, Unexpected

_CANDIDATES = 100
_MANY = 5  # fewer are better listed


@dataclass(frozen=True, slots=True)
class Prefix:
    """Text before the missing ``names`` as the checkpoint has them; with ``add``, as the module has them and the
    checkpoint has not."""

    names: frozenset[str]
    text: str
    add: bool

    def __str__(self) -> str:
        where = "without the" if self.add else "with a"
        one = len(self.names) == 1
        what = f"{next(iter(self.names))}, which is missing, is" if one else f"all {len(self.names)} missing names are"
        return f"{what} in the checkpoint {where} prefix {self.text!r}"

    def hint(self, given: KeyMapping | None) -> str:
        """What to do about it, where ``given`` is the user's key mapping."""
        if given is not None and not isinstance(given, Mapping):
            return f"have key_mapping {'put it before every key' if self.add else 'take it off'}"
        pattern, replacement = ("^", self.text.replace("\\", r"\\")) if self.add else (f"^{re.escape(self.text)}", "")
        pairs = [*(given or {}).items(), (pattern, replacement)]
        return f"pass key_mapping={{{', '.join(f'{_quoted(key)}: {_quoted(value)}' for key, value in pairs)}}}"

    def of_checkpoint(self, fqn: str) -> str | None:
        """The checkpoint's name for one of the module."""
        if not self.add:
            return self.text + fqn
        return fqn.removeprefix(self.text) if fqn.startswith(self.text) else None


def find(rows: Sequence[Row], unexpected: Collection[str]) -> Prefix | None:
    """The one prefix that keeps every missing name of ``rows`` from its value among the ``unexpected`` names, if there
    is one and its change leaves what is loaded as it is."""
    if not unexpected:
        return None
    groups: dict[int, list[str]] = {}
    for row in rows:
        if row.lacking:
            groups.setdefault(row.target, []).append(row.fqn)
    if not groups:
        return None
    missing = frozenset(name for names in groups.values() for name in names)
    loaded = {row.offer.name for row in rows if row.offer is not None}
    # The longest name ends the fewest keys. That many prefixes would tell nothing.
    longest = max(groups.values(), key=lambda names: max(map(len, names)))
    candidates = dict.fromkeys(itertools.islice(_candidates(longest, unexpected), _CANDIDATES))
    found = [
        prefix
        for prefix in itertools.starmap(partial(Prefix, missing), candidates)
        if all(any(prefix.of_checkpoint(name) in unexpected for name in names) for names in groups.values())
        and not (loaded and prefix.add)
        and not any(name.startswith(prefix.text) for name in loaded)
        and not any(prefix.of_checkpoint(name) in unexpected for name in loaded)  # one of two would be left over
    ]
    return found[0] if len(found) == 1 else None


def _candidates(names: Iterable[str], unexpected: Collection[str]) -> Iterator[tuple[str, bool]]:
    """What may be missing before, or has to go from, the names of one value."""
    for name in names:
        for key in unexpected:
            if key.endswith(f".{name}"):
                yield key[: -len(name)], False
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in unexpected:
                yield name[: dot.end()], True


def in_short(
    missing: Sequence[Problem],
    unexpected: Sequence[tuple[Unexpected, Problem]],
    rows: Sequence[Row],
    key_mapping: KeyMapping | None,
) -> list[Problem]:
    """The problems of names that do not meet; where a prefix is behind them, one that says so before those that follow
    from it."""
    extra = {item.name for item, _ in unexpected}
    prefix = find(rows, extra) if missing else None
    if prefix is None:
        beside = None if missing or key_mapping is not None else _beside([item.name for item, _ in unexpected], rows)
        problems = [problem if beside is None else replace(problem, implied=True) for _, problem in unexpected]
        return [*missing, *([] if beside is None else [beside]), *problems]
    known = {row.fqn for row in rows}.union(problem.fqn for problem in missing if problem.fqn is not None)
    ours = {prefix.of_checkpoint(fqn) for fqn in known}
    told = Problem(str(prefix), hint=prefix.hint(key_mapping))
    met = [
        problem.fqn in prefix.names or (problem.fqn is not None and prefix.of_checkpoint(problem.fqn) in extra)
        for problem in missing
    ]
    return [
        told,
        *(replace(problem, implied=implied) for problem, implied in zip(missing, met, strict=True)),
        *(replace(problem, implied=item.name in ours) for item, problem in unexpected),
    ]


def _beside(names: Sequence[str], rows: Sequence[Row]) -> Problem | None:
    """Where nothing is missing, and all that is too much lies under one part that the module has not: averaged weights
    beside the others, an optimiser's state."""
    first = names[0].partition(".")[0] + "." if len(names) >= _MANY else ""
    if not first or not all(name.startswith(first) for name in names) or any(row.fqn.startswith(first) for row in rows):
        return None
    drop = f"key_mapping=lambda key: None if key.startswith({_quoted(first)}) else key"
    what = f"all {len(names)} keys that the module has no place for begin with {first!r}"
    return Problem(what, hint=f"pass strict=False to leave them out, or drop them: {drop}")


def _quoted(text: str) -> str:
    """As a user would write it in Python."""
    if '"' in text or text.endswith("\\") or not text.isprintable():
        return repr(text)
    return f'r"{text}"' if "\\" in text else f'"{text}"'
