"""Patterns of names, as ``fnmatch`` has them, and prefixes: found by the name, as there may be one for every layer."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

_WILD = re.compile(r"[*?[]")
Value = TypeVar("Value")


class Patterns(dict[str, Value]):
    """Values by patterns. Not to be changed once it is made.

    A name is held against those patterns only that begin with parts of it.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        super().__init__(values)
        self._by_head: dict[str, list[tuple[int, str, Callable[[str], object]]]] = {}
        for number, pattern in enumerate(values):
            match = re.compile(fnmatch.translate(pattern)).match
            self._by_head.setdefault(_head(pattern), []).append((number, pattern, match))

    def matching(self, name: str) -> list[str]:
        """The patterns that match a name, in their order."""
        return [pattern for _, pattern in sorted(self._found(name))]

    def first(self, names: Iterable[str]) -> str | None:
        """The first pattern that matches one of the names."""
        found = [place for name in names for place in self._found(name)]
        return min(found)[1] if found else None

    def _found(self, name: str) -> Iterator[tuple[int, str]]:
        for prefix in prefixes(name):
            for number, pattern, match in self._by_head.get(prefix, ()):
                if match(name):
                    yield number, pattern


def prefixes(name: str) -> Iterator[str]:
    """A name, those of what it is a part of, and the empty one: the longest first."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def is_wild(text: str) -> bool:
    """Whether anything in a pattern stands for something else."""
    return _WILD.search(text) is not None


def _head(pattern: str) -> str:
    """The parts of names that a pattern begins with, as far as they are whole and nothing in them is wild."""
    wild = _WILD.search(pattern)
    return pattern if wild is None else pattern[: wild.start()].rpartition(".")[0]
