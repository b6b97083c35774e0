"""Everything weightlift raises, and the record that every message is made of.

    WeightliftError
    ├── CheckpointError        (ValueError)         what is on disk breaks a rule of its format
    │   ├── CheckpointNotFound (FileNotFoundError)  nothing to load at that place
    │   ├── CheckpointChanged                       a file is not the one that was planned with
    │   └── CheckpointCorrupt                       a file's content is not what its hash says (``verify=True``)
    ├── DeferError             (RuntimeError)       a constructor did what deferred construction can't follow
    ├── PlanError              (RuntimeError)       the module and the checkpoint do not fit; nothing was changed
    ├── TransferError          (RuntimeError)       reading or copying failed
    ├── RanksError             (RuntimeError)       another rank failed, is gone, or loads something else
    ├── CaptureError           (RuntimeError)       what was to be captured isn't there, or did not run as it should
    └── LoadCancelled                               the ``cancel`` event was set

Problems are collected and raised once: ``error.problems`` holds every one of them as a `Problem`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weightlift.folding import as_one, unnumbered
from weightlift.visible import visible

_SHOWN = 20
_ALIKE = 3  # fewer are better told one by one
_LINES = "\n\t"  # other libraries' messages, which are told as found, may have several


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: what, with which tensor, where, what was expected and found, what to do.

    ``start`` and ``end`` are a half-open byte range of ``file``. ``implied``: it follows from a problem before it, and
    messages show that in its place.
    """

    what: str
    key: str | None = None
    fqn: str | None = None
    file: Path | str | None = None
    start: int | None = None
    end: int | None = None
    expected: str | None = None
    found: str | None = None
    hint: str | None = None
    implied: bool = False

    def __str__(self) -> str:
        name = self.fqn if self.fqn == self.key or self.key is None else self.key
        if self.fqn is not None and self.key is not None and self.fqn != self.key:
            name = f"{self.fqn} (key {self.key})"
        place = "" if self.file is None else str(self.file)
        if self.start is not None and self.end is not None:
            place += f"[{self.start}:{self.end}]"
        where = [visible(part) for part in (place, name) if part]
        head = ": ".join([*where, self.what] if self.what else where)
        if self.expected is not None:
            head += f"; expected {self.expected}"
        if self.found is not None:
            head += f"; found {self.found}"
        if self.hint is not None:
            head += f" — {self.hint}"
        return visible(head, keep=_LINES)


class WeightliftError(Exception):
    """The base of every error of the library. ``problems`` lists all that was found, not only the first."""

    def __init__(self, summary: str, problems: Iterable[Problem] = ()) -> None:
        self.summary = summary
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(summary, self.problems)

    def __str__(self) -> str:
        summary = visible(self.summary, keep=_LINES)
        if not self.problems:
            return summary
        if len(self.problems) == 1:
            place = "" if self.problems[0].file is None else visible(str(self.problems[0].file))
            problem = str(self.problems[0])
            return f"{summary}: {problem.removeprefix(f'{place}: ') if place and summary.endswith(place) else problem}"
        lines = told(self.problems)
        shown = lines[:_SHOWN]
        if len(lines) > _SHOWN:
            shown.append(f"… and {len(lines) - _SHOWN} more, all in `.problems`")
        return "\n".join([f"{summary} ({len(self.problems)} problems):", *(f"  {line}" for line in shown)])


def told(problems: Sequence[Problem]) -> list[str]:
    """Problems as the lines of a list: those of repeated layers in one line, and in one after the last problem before
    them those that follow from others."""
    patterns = [_pattern(problem) for problem in problems]
    groups: dict[object, list[Problem]] = {}
    for pattern, problem in zip(patterns, problems, strict=True):
        groups.setdefault(pattern, []).append(problem)
    one_line = {pattern for pattern, group in groups.items() if _fold(group)}
    lines = []
    implied = sum(problem.implied for problem in problems)
    for pattern, problem in zip(patterns, problems, strict=True):
        if problem.implied:
            if implied:
                lines.append(f"  ({implied} of the problems follow from this; all are in `.problems`)")
                implied = 0
        elif pattern not in one_line:
            lines.append(f"- {problem}")
        elif problem is groups[pattern][0]:
            lines.append(f"- {_as_one(groups[pattern])}")
    return lines


def _fold(alike: Sequence[Problem]) -> bool:
    """Whether these are problems of many names, each with one."""
    return len(alike) >= _ALIKE and len({(problem.fqn, problem.key) for problem in alike}) == len(alike)


def _pattern(problem: Problem) -> object:
    """What a problem has in common with those of other layers."""
    texts = tuple(map(unnumbered, _texts(problem)))
    return texts, problem.file, problem.start is None, problem.expected, problem.found, problem.implied


def _as_one(alike: Sequence[Problem]) -> Problem:
    """For problems that differ in the numbers of layers alone, and in where they lie."""
    what, key, fqn, hint = (as_one(texts) for texts in zip(*map(_texts, alike), strict=True))
    file = alike[0].file if alike[0].start is None else f"{len(alike)} ranges of {alike[0].file}"
    name = f"{fqn or key} ×{len(alike)}"
    name += f" (key {key})" if fqn and key and fqn != key else ""
    return replace(alike[0], what=what, key=name, fqn=None, file=file, start=None, end=None, hint=hint or None)


def _texts(problem: Problem) -> tuple[str, str, str, str]:
    """What may name a layer."""
    return problem.what, problem.key or "", problem.fqn or "", problem.hint or ""


class CheckpointError(WeightliftError, ValueError):
    """A checkpoint breaks a rule of its format; it was not opened."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given place."""


class CheckpointChanged(CheckpointError):
    """A file was replaced, cut or written since the checkpoint was opened."""


class CheckpointCorrupt(CheckpointError):
    """``verify=True`` found that the content of a file is not what its hash says."""


class DeferError(WeightliftError, RuntimeError):
    """A constructor did something that deferred construction cannot follow; ``defer=False`` builds ordinarily."""


class PlanError(WeightliftError, RuntimeError):
    """The module and the checkpoint do not fit each other. Nothing was read and nothing was changed."""


class TransferError(WeightliftError, RuntimeError):
    """Reading or copying failed. ``written`` names the parameters of an existing module that had been written."""

    def __init__(self, summary: str, problems: Iterable[Problem] = (), written: Iterable[str] = ()) -> None:
        super().__init__(summary, problems)
        self.written: tuple[str, ...] = tuple(written)

    def __str__(self) -> str:
        text = super().__str__()
        if not self.written:
            return text
        names = ", ".join(self.written[:_SHOWN])
        more = f" and {len(self.written) - _SHOWN} more" if len(self.written) > _SHOWN else ""
        return f"{text}\nalready written when it failed: {names}{more}"


class RanksError(WeightliftError, RuntimeError):
    """Ranks that load together do not agree, or one of them failed. Every rank raises; ``problems`` name the ranks."""


class CaptureError(WeightliftError, RuntimeError):
    """What was to be captured does not exist, or did not run, or can't be trusted."""


class LoadCancelled(WeightliftError):
    """The load was stopped through its ``cancel`` event; a callable's module is dropped.

    ``written`` names the parameters of an existing module that had been written.
    """

    def __init__(self, summary: str = "the load was cancelled", written: Iterable[str] = ()) -> None:
        super().__init__(summary)
        self.written: tuple[str, ...] = tuple(written)
