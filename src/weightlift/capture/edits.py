"""Edits in flight: what ``replace`` is given, and what it may return. Plain code that dynamo can trace."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from weightlift.capture.values import Recipe, holds_tensors, items_of, kind_of

_NUMBERS = (int, float, complex, torch.SymInt, torch.SymFloat)  # what can be written to a part of a tensor


class Misfit(TypeError, AssertionError):
    """An edit that can't stand where it should. Where a call is being traced, torch lets assertions through alone."""


def edits(recipe: Recipe, call: int) -> bool:
    """Whether ``replace`` is for this call of the module."""
    return recipe.replace is not None and (recipe.calls is None or call in recipe.calls)


def edit(value: Any, recipe: Recipe, tap: str, fqn: str) -> Any:
    """What ``replace`` makes of a value; only the chosen part is given to it and changed.

    None leaves what it was given, which it may have written to, as torch has it for hooks. Raises TypeError for what
    cannot stand there: the model would fail later, or take one of a tuple's elements out of a tensor.
    """
    assert recipe.replace is not None
    if recipe.part is not None and not hasattr(value, "clone"):
        raise TypeError(f"tokens and at edit a part of a tensor: choose one with index=…; found {kind_of(value)}")
    given = value if recipe.part is None else value[recipe.part]
    new = recipe.replace(given)
    if new is None:
        new = given
    elif not (_stands_for(new, given) or (recipe.part is not None and isinstance(new, _NUMBERS))):
        _refuse(tap, fqn, kind_of(given), kind_of(new))
    if recipe.part is None:
        return new
    changed = value.clone()
    changed[recipe.part] = new
    return changed


def _refuse(tap: str, fqn: str, given: str, returned: str) -> None:
    """Runs while a call is being traced, not as a part of it."""
    remedy = "return one of the same kind, or None to leave it; an element alone is edited with index=…"
    where = f"tap {tap!r}" + (f", at module {fqn!r}" if fqn else "")
    raise Misfit(f"{where}: replace returned {returned} where it was given {given}; {remedy}")


_refuse._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


def _stands_for(new: Any, given: Any) -> bool:
    """Whether an edit can make one of the other: a tensor for a tensor, and a structure for a structure.

    An object of another class may be what a module takes for either if it holds tensors, as some masks do; what may
    stand for such an object, only its class knows.
    """
    tensor, structure = _like_a_tensor(given), items_of(given) is not None
    if _like_a_tensor(new):
        return tensor or not structure
    if items_of(new) is not None:
        return structure or not tensor
    return not (tensor or structure) or holds_tensors(new)


def _like_a_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor | PackedSequence) or hasattr(value, "__torch_function__")
