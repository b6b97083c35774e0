"""Names by the parts that a regular expression begins with: one of thousands is tried only where it may match."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_SPECIAL = set(".^$*+?{}[]|()\\")
_REPEATING = set("*+?{")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_FLAGS = re.compile(r"\(\?[aiLmsux#]")  # and remarks, in which anything may stand
_LONGEST = 3  # parts in a row that names are found by


class Names:
    """Names in an order, each of which may change. What is found for a pattern are all that it can match, and more."""

    def __init__(self, names: Sequence[str]) -> None:
        self._all = range(len(names))
        self._by_parts: dict[tuple[str, ...], list[int]] = {}
        for place, name in enumerate(names):
            self.add(place, name)

    def add(self, place: int, name: str) -> None:
        """There is another name at this place now. It is found by the one before as well: that is looked at in vain."""
        for run in set(_runs(name.split("."))):
            self._by_parts.setdefault(run, []).append(place)

    def matching(self, pattern: str) -> Sequence[int]:
        """The places of the names that a pattern may match, in order."""
        parts = _whole_parts(pattern)
        found = [self._by_parts.get(run, ()) for run in _runs(parts) if len(run) == min(len(parts), _LONGEST)]
        return sorted(set(min(found, key=len))) if found else self._all


def has_whole_parts(pattern: str) -> bool:
    """Whether there is anything to find names by."""
    return bool(_whole_parts(pattern))


def _runs(parts: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for start in range(len(parts)):
        for end in range(start + 1, min(start + _LONGEST, len(parts)) + 1):
            yield tuple(parts[start:end])


def _whole_parts(pattern: str) -> list[str]:
    """Parts that every match of a pattern has in a row, and whole. None where it may begin with something else."""
    if _FLAGS.search(pattern) or _has_alternatives(pattern):
        return []
    anchored = pattern.startswith("^")
    parts = _plain_beginning(pattern[anchored:]).split(".")
    # What a name has before the first, and after the last, is not known.
    return parts[not anchored : -1]


def _has_alternatives(pattern: str) -> bool:
    """Whether a pattern may begin in several ways; those that a group has begin within it."""
    if "|" not in pattern:
        return False
    depth = 0
    for char in _ESCAPED.sub("", pattern):
        depth += (char == "(") - (char == ")")
        if char == "[" or (char == "|" and depth == 0):
            return True
    return False


def _plain_beginning(pattern: str) -> str:
    """The characters that a pattern stands for itself with, up to the first that does not."""
    found: list[str] = []
    place = 0
    while place < len(pattern):
        char = pattern[place]
        if char == "\\" and place + 1 < len(pattern) and not pattern[place + 1].isalnum():
            place += 1
            char = pattern[place]
        elif char in _SPECIAL:
            if char in _REPEATING and found:
                found.pop()  # it may be left out
            break
        found.append(char)
        place += 1
    return "".join(found)
