"""Names of repeated layers written as one: ``layers.{0…5}.weight``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_LISTED = 4  # numbers with gaps, which tell more than how many there are


def unnumbered(name: str) -> str:
    """A name with ``*`` for each number between its dots."""
    return _NUMBER.sub("*", name)


def folded(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ only in numbers written as one, each with how many it stands for."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unnumbered(name), []).append(name)
    return [(as_one(members), len(members)) for members in groups.values()]


def as_one(names: Sequence[str]) -> str:
    """Names, or texts, that differ only in numbers, as one."""
    if len(names) == 1:
        return names[0]
    columns = list(zip(*(_NUMBER.findall(name) for name in names)))
    spans = []
    for column in columns:
        numbers = sorted({int(item) for item in column})
        if len(numbers) == 1:
            spans.append(str(numbers[0]))
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            spans.append(f"{{{numbers[0]}…{numbers[-1]}}}")
        else:
            few = ",".join(map(str, numbers)) if len(numbers) <= _LISTED else ""
            spans.append(f"{{{few or f'{len(numbers)} of {numbers[0]}…{numbers[-1]}'}}}")
    parts = iter(spans)
    return _NUMBER.sub(lambda _: next(parts), names[0])
