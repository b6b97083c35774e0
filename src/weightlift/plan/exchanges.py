"""Which parts of names have to be exchanged so that a checkpoint's become a module's.

Names of repeated layers are looked at once, as a pattern, so that the search takes as long as a model has kinds of
tensors. It ends without an answer where there are two, and where it would take long.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MOST = 3  # exchanges at once
_FEWEST = 2  # names that one has to explain: one alone may be chance
_TRIED = 300
_PATTERNS = 500

Parts = tuple[str, ...]
Pattern = tuple["str | None", ...]  # the parts of a name, None for a number
Shape = tuple[int, ...]


class Exchange(NamedTuple):
    """``old`` parts of a checkpoint's names and the ``new`` ones in their place: where names begin with them
    (``leading``), or a single part wherever it is, which goes without replacement if ``new`` is empty."""

    old: Parts
    new: Parts
    leading: bool


Exchanges = frozenset[Exchange]


class Wanted(NamedTuple):
    """A missing name's shape, and what stands for its value: names with one value need one of them."""

    shape: Shape
    value: Hashable


@dataclass(slots=True)
class _Found:
    """What some exchanges explain: which pattern of the checkpoint stands for which of the module, and how many
    values that gives. ``wrong``: they change what is right, or give a name twice, or another shape."""

    pairs: dict[Pattern, Pattern] = field(default_factory=dict)
    count: int = 0
    each: dict[Exchange, int] = field(default_factory=dict)
    wrong: bool = False

    def differs(self, other: _Found) -> bool:
        """Whether the two explain anything differently."""
        back = {new: old for old, new in other.pairs.items()}
        return any(other.pairs.get(old, new) != new or back.get(new, old) != old for old, new in self.pairs.items())


def _grouped(names: Iterable[str]) -> dict[Pattern, dict[Parts, str]]:
    """Pattern → numbers → name."""
    found: dict[Pattern, dict[Parts, str]] = {}
    for name in names:
        parts = name.split(".")
        pattern = tuple([None if part.isdecimal() else part for part in parts])
        found.setdefault(pattern, {})[tuple([part for part in parts if part.isdecimal()])] = name
    return found


def nearly(total: int) -> int:
    """How many of ``total`` may be left unexplained."""
    return max(total // 10, int(total > 4))


class Search:
    """``missing`` and ``unexpected`` names that may stand for each other, and ``fixed`` ones, which are right."""

    def __init__(self, missing: Mapping[str, Wanted], unexpected: Mapping[str, Shape], fixed: Iterable[str]) -> None:
        self._wanted, self._shapes = missing, unexpected
        self._missing = _grouped(missing)
        self._unexpected = _grouped(unexpected)
        kept = _grouped(fixed)
        self._kept_parts = set(itertools.chain.from_iterable(kept))
        self._kept_heads = {pattern[:length] for pattern in kept for length in range(1, len(pattern) + 1)}
        names_of = Counter(item.value for item in missing.values())
        self._total = len(names_of)
        # Of names with one value all but one may well be missing.
        self._needed = {
            pattern: sum(names_of[missing[name].value] == 1 for name in members.values())
            for pattern, members in self._missing.items()
        }
        self._by_first: dict[tuple[Parts, Shape], list[Pattern]] = {}
        for pattern, members in self._unexpected.items():
            for numbers, name in members.items():
                self._by_first.setdefault((numbers, unexpected[name]), []).append(pattern)
        self._agreeing: dict[tuple[Pattern, Pattern], frozenset[Hashable] | None] = {}
        self._options: dict[Pattern, list[Exchanges]] = {}
        self._tried: dict[Exchanges, _Found] = {}

    def best(self) -> list[Exchanges]:
        """The exchanges that explain all values, or nearly all, in each way to write them: most values, then fewest
        exchanges. Empty if there is no explanation that every other one agrees with."""
        if not self._total or max(len(self._missing), len(self._unexpected)) > _PATTERNS:
            return []
        ranks: dict[Exchanges, tuple[int, int]] = {}
        for most in range(1, MOST + 1):
            if not self._extend(frozenset(), most, set()):
                return []
            ranks = self._ranked()
            if any(-count == self._total for count, _ in ranks.values()):
                break
        for rank in sorted(set(ranks.values())):
            ways = [chosen for chosen in ranks if ranks[chosen] == rank]
            if not any(self._tried[ways[0]].differs(self._tried[chosen]) for chosen in ranks):
                return sorted(ways, key=lambda chosen: (sum(item.leading for item in chosen), sorted(chosen)))
        return []

    def _ranked(self) -> dict[Exchanges, tuple[int, int]]:
        """What explains enough, as it is preferred. What fewer exchanges explain as well is no explanation."""
        for chosen in list(self._tried):
            for item in chosen:
                self._with(chosen - {item})
        ranks = {
            chosen: (-found.count, len(chosen)) for chosen, found in self._tried.items() if self._explains(found)
        }
        most = [max((-count for count, size in ranks.values() if size < limit), default=0) for limit in range(MOST + 1)]
        return {chosen: (count, size) for chosen, (count, size) in ranks.items() if -count > most[size]}

    def _explains(self, found: _Found) -> bool:
        if found.wrong or not found.each or self._total - found.count > nearly(self._total):
            return False
        return min(found.each.values()) >= _FEWEST

    def _extend(self, chosen: Exchanges, most: int, seen: set[Exchanges]) -> bool:
        """Try ``chosen`` with further exchanges, up to ``most``. False when it takes too long."""
        if chosen in seen:
            return True
        seen.add(chosen)
        if len(self._tried) >= _TRIED:
            return False
        found = self._with(chosen)
        if len(chosen) == most or found.wrong:
            return True
        left = nearly(self._total)
        explained = set(found.pairs.values())
        for pattern in self._missing:
            if pattern in explained:
                continue
            for option in self._options_of(pattern):
                more = chosen | option
                if len(more) <= most and _consistent(more) and not self._extend(more, most, seen):
                    return False
            left -= self._needed[pattern]
            if left < 0:
                break
        return True

    def _with(self, chosen: Exchanges) -> _Found:
        if chosen not in self._tried:
            self._tried[chosen] = self._made(chosen)
        return self._tried[chosen]

    def _made(self, chosen: Exchanges) -> _Found:
        found, taken = _Found(each=dict.fromkeys(chosen, 0)), dict[Pattern, frozenset[Hashable]]()
        singles = {item.old[0]: item for item in chosen if not item.leading}
        leading = sorted((item for item in chosen if item.leading), key=lambda item: -len(item.old))
        for old in self._unexpected:
            new, used = _exchanged(old, singles, leading)
            if not used or new not in self._missing:
                continue
            given = self._values(old, new)
            if given is None or new in taken:
                found.wrong = True
                return found
            if given:
                found.pairs[old], taken[new] = new, given
                for item in used:
                    found.each[item] += len(given)
        tied = self._total < len(self._wanted)
        found.count = len(frozenset().union(*taken.values())) if tied else sum(map(len, taken.values()))
        return found

    def _values(self, old: Pattern, new: Pattern) -> frozenset[Hashable] | None:
        """The values that names of one pattern give to those of another; None if they have other shapes."""
        if (old, new) not in self._agreeing:
            wanted, offered = self._missing[new], self._unexpected[old]
            both = [(self._wanted[name], self._shapes[offered[at]]) for at, name in wanted.items() if at in offered]
            fits = all(item.shape == shape for item, shape in both)
            self._agreeing[old, new] = frozenset(item.value for item, _ in both) if fits else None
        return self._agreeing[old, new]

    def _options_of(self, pattern: Pattern) -> list[Exchanges]:
        """What would make a name of the checkpoint one of this pattern."""
        if pattern not in self._options:
            numbers, name = next(iter(self._missing[pattern].items()))
            alike = self._by_first.get((numbers, self._wanted[name].shape), [])
            found = dict[Exchanges, None]()
            for old in alike:
                if self._values(old, pattern):
                    ways = [way for way in _between(old, pattern) if not self._touches_fixed(way)]
                    found.update((way, None) for way in ways[:1] + [way for way in ways[1:] if len(way) < len(ways[0])])
            self._options[pattern] = list(found)
        return self._options[pattern]

    def _touches_fixed(self, option: Exchanges) -> bool:
        return any(
            (item.old in self._kept_heads if item.leading else item.old[0] in self._kept_parts)
            or (not item.old and bool(self._kept_heads))
            for item in option
        )


def _consistent(chosen: Exchanges) -> bool:
    """Whether nothing is to become two things."""
    return len({(item.old, item.leading) for item in chosen}) == len(chosen)


def _exchanged(
    name: Pattern, singles: Mapping[str, Exchange], leading: Iterable[Exchange]
) -> tuple[Pattern, list[Exchange]]:
    """A name after exchanges, and those that changed it."""
    used: list[Exchange] = []
    for item in leading:
        if name[: len(item.old)] == item.old:
            name = (*item.new, *name[len(item.old) :])
            used.append(item)
            break
    parts: list[str | None] = []
    for part in name:
        single = None if part is None else singles.get(part)
        if single is None:
            parts.append(part)
        else:
            parts += single.new
            used.append(single)
    return tuple(parts), used


def _between(old: Pattern, new: Pattern) -> Iterator[Exchanges]:
    """The ways from one pattern to another, if they differ by few exchanges."""
    if len(old) == len(new):
        if (singles := _singles(old, new)) is not None:
            yield singles
    elif len(old) == len(new) + 1:
        at = next((at for at, (one, other) in enumerate(zip(old, new)) if one != other), len(new))
        part = old[at]
        if part is not None and at < len(new) and old[at + 1 :] == new[at:]:
            yield frozenset([Exchange((part,), (), leading=False)])
    # Else the beginnings differ, up to the first number at most, and single parts after them.
    heads = [list(itertools.takewhile(lambda part: part is not None, name)) for name in (old, new)]
    tails = [name[len(head) :] for name, head in zip((old, new), heads, strict=True)]
    if len(tails[0]) != len(tails[1]):
        return
    while heads[0] and heads[1] and heads[0][-1] == heads[1][-1]:
        tails = [(head.pop(), *tail) for head, tail in zip(heads, tails, strict=True)]
    behind = _singles(tails[0], tails[1]) if tails[0] else None
    if heads[0] == heads[1] or behind is None:
        return
    first, second = (tuple(part for part in head if part is not None) for head in heads)
    yield behind | {Exchange(first, second, leading=True)}


def _singles(old: Pattern, new: Pattern) -> Exchanges | None:
    """The single parts in which two patterns of one length differ; None where they are many, or numbers."""
    differing = {(one, other) for one, other in zip(old, new, strict=True) if one != other}
    if len(differing) > MOST:
        return None
    found = [Exchange((one,), (other,), leading=False) for one, other in differing if one and other]
    chosen = frozenset(found)
    return chosen if len(found) == len(differing) and _consistent(chosen) else None
