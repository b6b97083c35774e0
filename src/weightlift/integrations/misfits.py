"""What is said of values that don't fit the model: of another shape, or for tensors that can't all hold theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weightlift.deferred.inventory import Slot
from weightlift.errors import Problem
from weightlift.integrations.exclusive import NotNative
from weightlift.plan.records import Decisions

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


def no_tensor(fqn: str, key: str, found: object) -> Problem:
    """A value that can't be that of a parameter or buffer."""
    what = "the checkpoint has no tensor for it"
    return Problem(what, fqn=fqn, key=key, expected="a tensor", found=f"a {type(found).__name__}")


def refuse_shared(decisions: Decisions, slots: Iterable[Slot]) -> None:
    """Raise `NotNative` for tensors that share memory so that they can't all be filled: in part, or with themselves.
    Their libraries put a tensor of its own in the place of each. What was built on ``meta`` is not looked at."""
    if decisions.problems:
        on_meta = {slot.fqn for slot in slots if slot.tensor.is_meta}
        for problem in decisions.problems:
            if problem.fqn not in on_meta:
                raise NotNative(f"{problem.fqn}: {problem.what}", "each name is to get a tensor of its own")
