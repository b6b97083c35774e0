"""A prefix on all names of a checkpoint, or of a module: what training frameworks wrap around a model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from weightlift.options import KeyMapping
from weightlift.plan.records import Row

_CANDIDATES = 100


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
        return as_key_mapping(given, [(pattern, replacement)])

    def of_checkpoint(self, fqn: str) -> str | None:
        """The checkpoint's name for one of the module."""
        if not self.add:
            return self.text + fqn
        return fqn.removeprefix(self.text) if fqn.startswith(self.text) else None


def find_prefix(rows: Sequence[Row], unexpected: Collection[str]) -> Prefix | None:
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


def as_key_mapping(given: Mapping[str, str] | None, pairs: Iterable[tuple[str, str]]) -> str:
    """The ``pairs`` after those of a user's mapping, ready to be passed."""
    items = with_pairs(given or {}, pairs).items()
    return f"pass key_mapping={{{', '.join(f'{quoted(pattern)}: {quoted(name)}' for pattern, name in items)}}}"


def with_pairs(given: Mapping[str, str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A key mapping with further ``pairs`` at its end."""
    found = dict(given)
    for pattern, name in pairs:
        while pattern in found:  # twice in turn takes two ways to write it
            pattern = f"(?:{pattern})"
        found[pattern] = name
    return found


def quoted(text: str) -> str:
    """As a user would write it in Python."""
    if '"' in text or text.endswith("\\") or not text.isprintable():
        return repr(text)
    return f'r"{text}"' if "\\" in text else f'"{text}"'
