"""What a ``parallelize`` function did to tensors besides spreading them: hooks, attributes, values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from weightlift.deferred.inventory import storage_address

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_MAKE_NO_VALUES = {
    torch.empty, torch.empty_like, torch.empty_permuted, torch.empty_strided,
    torch.Tensor.new_empty, torch.Tensor.new_empty_strided,
}  # fmt: skip


class Births(TorchFunctionMode):
    """Sees, on this thread, which tensors are made without values: ``Module.to_empty`` leaves such ones."""

    def __init__(self) -> None:
        super().__init__()
        self._born: dict[int, tuple[torch.Tensor, int]] = {}  # kept alive, so that no other gets the address

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call, and note what was made."""
        made = func(*args, **(kwargs or {}))
        if func in _MAKE_NO_VALUES and isinstance(made, torch.Tensor) and not made.is_meta and not made.is_inference():
            self._born[storage_address(made)] = made, made._version
        return made

    def has_values(self, tensor: torch.Tensor) -> bool:
        """False for what was made without values and was not written to since."""
        found = self._born.get(storage_address(tensor))
        return found is None or found[0]._version != found[1]


def hand_over(left: torch.Tensor, tensor: torch.Tensor) -> None:
    """Give ``tensor``, which takes the place of ``left``, the hooks, attributes and ``requires_grad`` of that one.

    Where it has no hooks yet the two share the table of them, so that handles go on working.
    """
    if tensor.requires_grad != left.requires_grad:
        tensor.requires_grad_(left.requires_grad)
    tensor.__dict__.update(left.__dict__)
    for name in _HOOKS:
        hooks: OrderedDict[int, Any] | None = getattr(left, name)
        if not hooks:
            continue
        if getattr(tensor, name) is None:
            setattr(tensor, name, hooks)
        else:
            getattr(tensor, name).update(hooks)
