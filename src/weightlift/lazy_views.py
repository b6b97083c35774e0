"""Tensors that show their memory conjugated or negated (torch's lazy views): telling, and making them."""

from __future__ import annotations

import torch

_AS_IT_LIES, _CONJUGATED = (False, False), (True, False)


def shown(tensor: torch.Tensor) -> tuple[bool, bool]:
    """Whether a tensor shows its memory conjugated, and negated."""
    return (tensor.is_conj(), True) if tensor.is_neg() else _CONJUGATED if tensor.is_conj() else _AS_IT_LIES


def shown_as(tensor: torch.Tensor, lazily: tuple[bool, bool]) -> torch.Tensor:
    """A view of the same memory that is conjugated, and negated, once more: twice is not at all."""
    conjugated, negated = lazily
    tensor = tensor.conj() if conjugated else tensor
    return torch._neg_view(tensor) if negated else tensor
