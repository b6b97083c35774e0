"""Facts about tensor classes and operators that a mode needs to answer a call in their place."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def is_plain(kind: type) -> bool:
    """True for tensor classes that leave ATen calls alone, as ``nn.Parameter`` does."""
    plain = (torch.Tensor.__torch_dispatch__, torch._C._disabled_torch_dispatch_impl)
    return kind.__torch_dispatch__ in plain  # type: ignore[attr-defined]


def is_bounded(args: Any, kwargs: Any) -> bool:
    """Whether a ``clamp`` of these arguments has a bound; without any torch refuses it."""
    return any(bound is not None for bound in (*args[1:], *kwargs.values()))


def result_of(func: Any, targets: list[torch.Tensor]) -> Any:
    """What an in-place call on ``targets`` returns, by its schema."""
    returns = func._schema.returns
    if not returns:
        return None
    return targets[0] if len(returns) == 1 else tuple(targets)
