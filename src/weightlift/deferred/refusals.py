"""What torch refuses is refused where it is called, and not when the recorded call is run, if it ever is.

A call that is put off has not been looked at by torch: ``normal_(std=-1)``, samples for integers, a number that the
dtype can't hold, a ``copy_`` of another shape. Code may count on the error, and a checkpoint that has the value would
hide it.
"""

from __future__ import annotations

from typing import Any

import torch

from weightlift.ambient import outside_modes
from weightlift.deferred.calls import Call, tensors_in
from weightlift.deferred.schema import is_bounded
from weightlift.strides import interval

_DIMS = 6  # of which a small tensor has more than one element each
_MASKED = {"aten::masked_fill_"}
_DIVIDING = {"aten::div_", "aten::true_divide_"}
_ALWAYS_TAKEN = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})


class Trials:
    """Calls of one tensor and of numbers, each made once on a small tensor. Belongs to one recorder."""

    def __init__(self) -> None:
        self._passed: set[Any] = set()

    def make(self, func: Any, tensor: torch.Tensor, values: tuple[Any, ...], *, random: bool) -> None:
        """Raise what ``func(tensor, *values)`` would, as far as dtype, dims, overlap and numbers tell."""
        layout = None if tensor.is_contiguous() else tensor.stride()
        key: Any = (id(func), tensor.dtype, tensor.dim(), tensor.numel() == 1, layout, values)
        try:
            if key in self._passed:
                return
        except TypeError:  # a list among the values
            key = None
        with outside_modes():
            func(_small_like(tensor), *values, **({"generator": torch.Generator()} if random else {}))
        if key is not None:
            self._passed.add(key)

    def may_wait(
        self, func: Any, call: Call, targets: list[torch.Tensor], args: Any, kwargs: Any, beside: list[torch.Tensor]
    ) -> bool:
        """False for a call that writes to ``targets`` and that torch would refuse, or might. ``beside``: those of its
        tensors that lie in the memory of the first target."""
        if len(targets) == 1:
            target = targets[0]
            if not _may_fit(func, call, target, args, kwargs) or not all(_may_meet(target, other) for other in beside):
                return False
        return call.random or call.written != (0,) or self.are_taken(func, args, kwargs)

    def are_taken(self, func: Any, args: Any, kwargs: Any) -> bool:
        """False where torch may have no kernel of ``func`` for these dtypes, which their shapes alone do not tell:
        ``polar`` of halves. Made once for each choice of dtypes, on tensors of two elements a dim."""
        tensors = tensors_in((args, kwargs))
        if all(tensor.dtype in _ALWAYS_TAKEN for tensor in tensors):
            return True
        key = (id(func), *((tensor.dtype, tensor.dim()) for tensor in tensors))
        if key not in self._passed:
            try:
                with outside_modes(), torch.no_grad():
                    func(*_shrunk(args), **_shrunk(kwargs))
            except Exception:  # of whatever kind: then it is made as it is, and torch says
                return False
            self._passed.add(key)
        return True


def _shrunk(value: Any) -> Any:
    """The arguments of a call with small tensors in the place of all."""
    if isinstance(value, torch.Tensor):
        return torch.zeros([min(extent, 2) for extent in value.shape], dtype=value.dtype, device="cpu")
    if type(value) in (list, tuple):
        return type(value)(map(_shrunk, value))
    if type(value) is dict:
        return {name: None if name == "generator" else _shrunk(item) for name, item in value.items()}
    return value


def _small_like(tensor: torch.Tensor) -> torch.Tensor:
    """As many dims and, but for one element, more than one: torch is not as strict there. Repeats what is repeated."""
    extent = 2 if tensor.numel() > 1 and tensor.dim() <= _DIMS else 1
    repeated = _repeated(tensor)
    small = torch.zeros([1 if repeats else extent for repeats in repeated], dtype=tensor.dtype, device="cpu")
    return small.expand([2 if repeats else extent for repeats in repeated])


def _repeated(tensor: torch.Tensor) -> list[bool]:
    """For each dim, whether its elements are all the same memory."""
    return [step == 0 and extent > 1 for extent, step in zip(tensor.shape, tensor.stride())]


def _may_fit(func: Any, call: Call, target: torch.Tensor, args: Any, kwargs: Any) -> bool:
    """False where ``copy_`` or a pointwise call in place is one that torch would refuse, for its shapes or dtypes."""
    name = func._schema.name
    if name == "aten::clamp_" and not is_bounded(args, kwargs):
        return False
    if not call.pointwise and name not in _MASKED and name != "aten::copy_":
        return True
    if any(_repeated(target)):
        return False
    others = [tensor for tensor in tensors_in((args, kwargs)) if tensor is not target]
    if not all(_broadcasts(tensor.shape, target.shape) for tensor in others):
        return False
    if name == "aten::copy_" or name in _MASKED or target.dtype.is_complex:
        return True
    numbers = {type(value) for value in args}
    if target.dtype.is_floating_point:
        return complex not in numbers and not any(tensor.dtype.is_complex for tensor in others)
    # Integers and truth values: whether what comes out fits is torch's to say.
    plain = name not in _DIVIDING and not numbers & {float, complex}
    return plain and all(tensor.dtype == target.dtype for tensor in others)


def _may_meet(target: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two views of one storage are the same, or lie apart: else torch may refuse to write to the one out of the
    other."""
    places = [(item.storage_offset(), item.size(), item.stride(), item.dtype) for item in (target, other)]
    if other is target or places[0] == places[1]:
        return True
    if other.dtype != target.dtype:
        return False
    (start, end), (first, last) = (interval(size, stride, int(offset)) for offset, size, stride, _ in places)
    return end <= first or last <= start


def _broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    if len(shape) > len(onto):
        return False
    return all(extent in (1, wanted) for extent, wanted in zip(reversed(shape), reversed(onto)))
