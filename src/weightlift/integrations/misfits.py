"""What is said of values whose shape in the checkpoint is not the model's."""

from __future__ import annotations

from collections.abc import Sequence

from weightlift.errors import Problem


def shapes_differ(fqn: str, found: Sequence[int], expected: Sequence[int]) -> Problem:
    """One such value, with the option of ``from_pretrained`` that lets it pass."""
    return Problem(
        "the shapes differ",
        fqn=fqn,
        expected=f"{list(expected)} as the model has it",
        found=f"{list(found)} in the checkpoint",
        hint="pass ignore_mismatched_sizes=True to initialise it",
    )
