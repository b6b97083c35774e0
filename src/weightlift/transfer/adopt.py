"""How a value gets into the place of a module's tensor: into the tensor that is there, or as a new one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightlift.deferred.inventory import Slot, is_lazy
from weightlift.deferred.schema import is_plain
from weightlift.errors import Problem, TransferError
from weightlift.plan.records import Row
from weightlift.unstrided import unstrided


def wraps_others(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class whose values lie in other tensors, which ``.data =`` does not reach."""
    return type(tensor) not in (nn.Parameter, torch.Tensor) and is_traceable_wrapper_subclass(tensor)


def holds_its_bytes(tensor: torch.Tensor) -> bool:
    """Whether what lies in a tensor's memory are its values: not for torch's lazy views, and not for classes with a
    dispatch of their own, which may be made of other tensors and have no memory at all."""
    return not (tensor.is_conj() or tensor.is_neg()) and is_plain(type(tensor))


def fill(place: torch.Tensor, value: torch.Tensor, row: Row, written: Iterable[str]) -> None:
    """Copy a value to where it can't be read part by part; where elements share memory it is torch's order.

    Raises TransferError, with the names that were ``written``, for what the tensor's class refuses.
    """
    try:
        place.copy_(value)
    except Exception as error:
        problem = Problem(
            f"copying into a {type(place).__qualname__} failed: {type(error).__name__}: {error}",
            fqn=row.fqn,
            key=None if row.offer is None else row.offer.key,
            hint="load before the module's tensors are replaced by those of this class (quantised, for one)",
        )
        raise TransferError("loading failed", [problem], written) from error


def replaced(slot: Slot, value: torch.Tensor) -> torch.Tensor:
    """Put a new buffer into a slot, as ``Module.to`` does: whoever else holds the old one did not ask for a cast."""
    new = value.detach()
    if slot.tensor.requires_grad and (new.is_floating_point() or new.is_complex()):
        new.requires_grad_()
    slot.put(new)
    return new


def adopt(slot: Slot, value: torch.Tensor, *, fresh: bool) -> torch.Tensor:
    """Put ``value`` into the tensor object of a slot, so that ties, hooks and references survive.

    A new object takes its place only where torch can't re-point the old one (from ``meta``, an uninitialised one, one
    that is made of other tensors), or where a tie is given up.
    """
    tensor = slot.tensor
    lazy = is_lazy(tensor)
    wraps = not lazy and wraps_others(tensor)
    if not (fresh or lazy or wraps or tensor.is_meta or unstrided(tensor)):
        grad = tensor.grad if tensor.is_leaf else None
        if grad is not None and (tensor.dtype != value.dtype or tensor.device != value.device):
            grad.data = grad.detach().to(device=value.device, dtype=value.dtype)  # as `Module.to`
        tensor.data = value
        return tensor
    if lazy:
        tensor.materialize(tuple(value.shape), device=value.device, dtype=value.dtype)  # type: ignore[attr-defined]
        tensor.data = value
        return tensor
    if wraps and type(value) is not type(tensor):
        value = tensor.detach().to(device=value.device, dtype=value.dtype, copy=True).copy_(value)
    new: torch.Tensor = value
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(value, requires_grad=tensor.requires_grad)
        new.__dict__.update({**tensor.__dict__, **new.__dict__})  # its own first: what it is made of may stand there
    slot.put(new)
    return new
