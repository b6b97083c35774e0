"""What a command with ``--json`` prints of an error: the same object, whichever command it is."""

from __future__ import annotations

from typing import Any

from weightlift.cli.wording import as_flags
from weightlift.errors import Problem, WeightliftError


def error_as_json(error: Exception, text: str | None = None) -> dict[str, Any]:
    """An error as plain data for ``json.dumps``. ``text`` sums it up where the error does not do so itself."""
    summary = str(error)
    problems: tuple[Problem, ...] = ()
    if isinstance(error, WeightliftError):
        summary, problems = error.summary, error.problems
    return {
        "error": {
            "kind": type(error).__name__,
            "summary": as_flags(summary) if text is None else text,
            "problems": [problem_as_json(problem) for problem in problems],
        }
    }


def problem_as_json(problem: Problem) -> dict[str, Any]:
    """One problem. Names are exactly those of the files and the module; the hint is in the command line's words."""
    whole = problem.start is None or problem.end is None
    return {
        "what": problem.what,
        "key": problem.key,
        "fqn": problem.fqn,
        "file": None if problem.file is None else str(problem.file),
        "range": None if whole else [problem.start, problem.end],
        "expected": problem.expected,
        "found": problem.found,
        "hint": None if problem.hint is None else as_flags(problem.hint),
    }
