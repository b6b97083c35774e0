"""Tensors of classes that somebody else made (quantised ones), which a model's own library keeps as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weightlift.errors import CheckpointError
from weightlift.integrations.exclusive import NotNative

_WHY = "its own library puts them into the model as they are"


def refuse_foreign(state_dict: Mapping[str, Any]) -> None:
    """Raise `NotNative` for a mapping with tensors of another class than torch's own."""
    for key, value in state_dict.items():
        if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise NotNative(f"{key}: a {type(value).__name__} in the state dict", _WHY)


def refuse_allowed(error: CheckpointError) -> None:
    """Raise `NotNative` where a pickle was refused for the name of something that the program has told torch to allow
    (``torch.serialization.add_safe_globals``, as libraries of quantised tensors do): torch loads that with
    ``weights_only=True``."""
    for problem in error.problems:
        if problem.found in _allowed():
            raise NotNative(f"a pickle that holds {problem.found}", _WHY)


def _allowed() -> set[str]:
    """The names under which pickles may hold what was allowed."""
    given: list[Any] = torch.serialization.get_safe_globals()
    return {item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in given}
