"""What is said of values whose shape in the checkpoint is not the model's."""

from __future__ import annotations

from collections.abc import Sequence

from weightlift.errors import Problem

_HINT = "pass ignore_mismatched_sizes=True to initialise it"


def shapes_differ(
    fqn: str, found: Sequence[int], expected: Sequence[int], *, hint: str | None = _HINT
) -> Problem:
    """One such value; ``hint`` is the option of ``from_pretrained`` that lets it pass, where there is one."""
    return Problem(
        "the shapes differ",
        fqn=fqn,
        expected=f"{list(expected)} as the model has it",
        found=f"{list(found)} in the checkpoint",
        hint=hint,
    )
