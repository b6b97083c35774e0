"""Words that a module and a checkpoint have for the same parts of names (``blocks.0`` here, ``layers.0`` there), and
the key mapping that exchanges them: where that explains what is missing, and nothing else does.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from weightlift.options import KeyMapping
from weightlift.plan.exchanges import Exchange, Exchanges, Search, Wanted, nearly
from weightlift.plan.keys import renamed
from weightlift.plan.prefixes import as_key_mapping, with_pairs
from weightlift.plan.records import Row, Unexpected

_WAYS = 4  # to write the same exchanges

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Renaming:
    """``exchanges`` of parts, and the ``pairs`` of a key mapping that make them. ``names``: those of the ``missing``
    names that get their values. ``placed``: unexpected name → what becomes of it."""

    exchanges: tuple[Exchange, ...]
    pairs: Pairs
    names: frozenset[str]
    missing: int
    placed: Mapping[str, str]

    def __str__(self) -> str:
        count = len(self.names)
        which = f"all {count}" if count == self.missing else f"{count} of {self.missing}"
        return f"{which} missing names are in the checkpoint with {' and '.join(map(_told, self.exchanges))}"

    def hint(self, given: KeyMapping | None) -> str:
        """What to do about it, where ``given`` is the user's key mapping."""
        if given is not None and not isinstance(given, Mapping):
            return "have key_mapping give them the module's names"
        return as_key_mapping(given, self.pairs)


def _told(exchange: Exchange) -> str:
    old, new = ".".join(exchange.old), ".".join(exchange.new)
    if not old:
        return f"the prefix {new + '.'!r} left out"
    if not new:
        return f"a prefix {old + '.'!r}" if exchange.leading else f"a further part {old!r}"
    return f"{old!r} in place of {new!r}"


def find_renaming(
    rows: Sequence[Row], unexpected: Sequence[Unexpected], right: Mapping[str, str], given: KeyMapping | None
) -> Renaming | None:
    """The one renaming that finds all missing names of ``rows``, or nearly all, among the ``unexpected`` ones, in the
    shapes that the module has. ``right`` (key → name) is whatever else the checkpoint has, and must stay as it is."""
    lacking = {row.fqn: row for row in rows if row.lacking}
    shapes = {item.name: item.entry.shape for item in unexpected if item.entry is not None}
    if not lacking or not shapes:
        return None
    wanted = {fqn: Wanted(row.shape, row.target) for fqn, row in lacking.items()}
    fixed = [*(row.fqn for row in rows if not row.lacking), *right.values()]
    trial = None
    for chosen in Search(wanted, shapes, fixed).best()[:_WAYS]:
        trial = trial or _Trial(lacking, unexpected, right, given)
        for exchanges, pairs in _written(chosen, shapes):
            if (found := trial.of(exchanges, pairs)) is not None:
                return found
    return None


class _Trial:
    """What comes of a key mapping, found out with the very patterns that a user would pass."""

    def __init__(
        self,
        lacking: Mapping[str, Row],
        unexpected: Sequence[Unexpected],
        right: Mapping[str, str],
        given: KeyMapping | None,
    ) -> None:
        self._lacking, self._unexpected = lacking, unexpected
        names = {**right, **{item.key: item.name for item in unexpected}}
        by_call = given is not None and not isinstance(given, Mapping)
        self._given: dict[str, str] = {} if by_call else dict(given or {})  # type: ignore[arg-type]
        self._texts = {key: name if by_call else key for key, name in names.items()}
        self._before = renamed(self._texts.values(), self._given).names
        self._right = right

    def of(self, exchanges: tuple[Exchange, ...], pairs: Pairs) -> Renaming | None:
        """The renaming, if it is right: nothing else is touched, no name given twice, no shape another one."""
        full = with_pairs(self._given, pairs)
        done = renamed(self._texts.values(), full)
        if not (full.keys() - self._given.keys()).isdisjoint(done.idle):
            return None
        if len(set(done.names.values())) < len(done.names):
            return None
        changed = {text for text, name in done.names.items() if name != self._before[text]}
        if any(self._texts[key] in changed for key in self._right):
            return None
        placed: dict[str, str] = {}
        found: set[int] = set()
        for item in self._unexpected:
            text = self._texts[item.key]
            if text not in changed:
                continue
            if self._before[text] != item.name:  # a state-dict hook has renamed it
                return None
            name = placed[item.name] = done.names[text]
            row = self._lacking.get(name)
            if row is None:
                continue
            if item.entry is None or item.entry.shape != row.shape or row.unstrided:
                return None
            found.add(row.target)
        total = len({row.target for row in self._lacking.values()})
        if total - len(found) > nearly(total):
            return None
        names = frozenset(fqn for fqn, row in self._lacking.items() if row.target in found)
        return Renaming(exchanges, pairs, names, len(self._lacking), placed)


def _written(chosen: Exchanges, names: Iterable[str]) -> Iterator[tuple[tuple[Exchange, ...], Pairs]]:
    """Exchanges in each order, as a key mapping: one may make what another takes away."""
    depths: dict[Exchange, int] = {item: 0 for item in chosen if item.leading}
    places: dict[Exchange, set[str]] = {item: set() for item in chosen}
    singles = {item.old[0]: item for item in chosen if not item.leading}
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            if (item := singles.get(part)) is not None:
                depths[item] = min(depth, depths.get(item, depth))
                places[item].add(_place(depth, len(parts)))
    pairs = {item: _pair(item, places[item]) for item in chosen}
    for order in itertools.permutations(sorted(chosen, key=lambda item: (not item.leading, depths[item], item))):
        yield order, tuple(pairs[item] for item in order)


def _place(depth: int, parts: int) -> str:
    return "only" if parts == 1 else "first" if depth == 0 else "last" if depth == parts - 1 else "within"


def _pair(exchange: Exchange, places: set[str]) -> tuple[str, str]:
    """The pattern and the replacement, as simple as the ``places`` of a part in names allow."""
    old = r"\.".join(map(re.escape, exchange.old))
    new = ".".join(exchange.new).replace("\\", r"\\")
    if exchange.leading:
        return (rf"^{old}\." if old else "^"), (f"{new}." if new else "")
    if places == {"first"}:
        return rf"^{old}\.", (f"{new}." if new else "")
    if places == {"within"}:
        return rf"\.{old}\.", (f".{new}." if new else ".")
    if places == {"last"}:
        return rf"\.{old}$", f".{new}"
    before = r"\g<1>" if new[:1].isdigit() else r"\1"
    return (rf"(^|\.){old}(?=\.|$)", f"{before}{new}") if new else (rf"(^|\.){old}\.", before)
