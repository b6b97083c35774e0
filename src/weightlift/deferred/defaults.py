"""Another default dtype for one constructor, without setting torch's, which all threads of the process share.

`DefaultDtype` rewrites the calls of the thread that it is asked about: factories without a dtype get the wanted one,
and so does what torch would promote to the process's default (``torch.arange(3) / 2``). Some calls have resolved the
default before any mode sees them. Of these ``torch.Tensor(n)``, ``torch.Tensor([…])`` and
``tensor.to(torch.get_default_dtype())`` are known by the code that makes them; ``torch.get_default_dtype()`` itself
can't be answered.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from weightlift.deferred.calls import tensors_in

aten = torch.ops.aten

WantedDtype = torch.dtype | Callable[[FrameType], torch.dtype] | None
"""A default dtype, or a function that gives it for the frame of a call and those above; None: torch's own."""

# Factories that make integers unless they are told otherwise.
_INTEGER = {"aten::randint", "aten::randperm", "aten::tril_indices", "aten::triu_indices"}
# Of integers these give the default floating-point dtype; so does any pointwise call with a Python float.
_FLOATING = {
    "aten::reciprocal", "aten::sqrt", "aten::rsqrt", "aten::exp", "aten::exp2", "aten::expm1", "aten::log",
    "aten::log2", "aten::log10", "aten::log1p", "aten::sin", "aten::cos", "aten::tan", "aten::asin", "aten::acos",
    "aten::atan", "aten::sinh", "aten::cosh", "aten::tanh", "aten::sigmoid", "aten::erf", "aten::erfinv",
    "aten::atan2",
}  # fmt: skip
_BOOLEAN = {
    "aten::lt", "aten::le", "aten::gt", "aten::ge", "aten::eq", "aten::ne", "aten::isnan", "aten::isfinite",
    "aten::isinf", "aten::logical_and", "aten::logical_or", "aten::logical_not", "aten::logical_xor",
}  # fmt: skip


class DefaultDtype:
    """The wanted default, and the process's own as it was when the scope began."""

    def __init__(self, wanted: torch.dtype) -> None:
        self.wanted = wanted
        self.own = torch.get_default_dtype()

    @staticmethod
    def of(wanted: WantedDtype) -> DefaultDtype | None:
        """None where the process's own default is what is wanted."""
        if callable(wanted):
            return _ByFrame(wanted)
        return None if wanted is None or wanted == torch.get_default_dtype() else DefaultDtype(wanted)

    def rewrite(
        self, func: Any, args: Any, kwargs: dict[str, Any], dispatch: Callable[[Any, Any, Any], Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The arguments with which a call gives what it would under the wanted default. ``dispatch`` makes casts.

        To be called by ``__torch_dispatch__`` itself: the frame above that is the one looked at.
        """
        if _is_factory(func):
            if kwargs.get("dtype") is None:
                dtype = self._of_factory(func, args)
                kwargs = kwargs if dtype is None else {**kwargs, "dtype": dtype}
            elif func is aten.empty.memory_format and kwargs["dtype"] == self.own and _is_legacy(kwargs):
                kwargs = {**kwargs, "dtype": self.wanted}
        elif func is aten.lift_fresh.default:
            if args[0].dtype == self.own and _calls_tensor_class(sys._getframe(2)):
                args = (args[0].to(self.wanted),)  # torch.Tensor([1.0]): the data come as a tensor
        elif self._promotes(func, args, kwargs):
            cast = aten._to_copy.default
            args = tuple(
                dispatch(cast, (item,), {"dtype": self.wanted}) if isinstance(item, torch.Tensor) else item
                for item in args
            )
        return args, kwargs

    def _of_factory(self, func: Any, args: Any) -> torch.dtype | None:
        name = func._schema.name
        if name in _INTEGER:
            return None
        if name in ("aten::arange", "aten::full"):
            values = args[1:2] if name == "aten::full" else args
            if any(isinstance(value, complex) for value in values):
                return self.wanted.to_complex()
            return self.wanted if any(isinstance(value, float) for value in values) else None
        return self.wanted

    def _promotes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """True for a call whose arguments torch would convert from integers to the default dtype."""
        if not _may_promote(func) or kwargs.get("dtype") is not None or kwargs.get("rounding_mode") is not None:
            return False
        name = func._schema.name
        tensors = tensors_in((args, kwargs))
        if not tensors or any(tensor.dtype.is_floating_point or tensor.dtype.is_complex for tensor in tensors):
            return False
        return name in _FLOATING or name == "aten::div" or any(type(value) is float for value in args)

    def is_given(self, dtype: Any, frame: FrameType) -> bool:
        """True when ``frame`` took ``dtype`` from ``torch.get_default_dtype()``."""
        return dtype == self.own and "get_default_dtype" in frame.f_code.co_names

    def of_data(self, data: Any, kwargs: dict[str, Any], found: torch.dtype) -> torch.dtype | None:
        """The dtype that ``torch.tensor(data)`` has to be asked for; None when it says it itself."""
        if kwargs.get("dtype") is not None or found not in (self.own, self.own.to_complex()) or not _is_python(data):
            return None
        return self.wanted if found == self.own else self.wanted.to_complex()


class _ByFrame(DefaultDtype):
    """A default that depends on the code that asks."""

    def __init__(self, wanted: Callable[[FrameType], torch.dtype]) -> None:
        self._wanted = wanted
        self.own = torch.get_default_dtype()

    @property
    def wanted(self) -> torch.dtype:  # type: ignore[override]
        return self._wanted(sys._getframe(1))


@functools.cache
def _is_factory(func: Any) -> bool:
    schema = func._schema
    named = {argument.name for argument in schema.arguments}
    return "dtype" in named and not any("Tensor" in str(argument.type) for argument in schema.arguments)


@functools.cache
def _may_promote(func: Any) -> bool:
    name = func._schema.name
    if name in _BOOLEAN:
        return False
    return name in _FLOATING or name == "aten::div" or torch.Tag.pointwise in func.tags


def _is_legacy(kwargs: dict[str, Any]) -> bool:
    """``torch.Tensor(3)``; not ``torch.FloatTensor(3)``, which means what it says."""
    return "layout" in kwargs and "pin_memory" not in kwargs and _calls_tensor_class(sys._getframe(3))


def _calls_tensor_class(frame: FrameType) -> bool:
    names = frame.f_code.co_names
    return "Tensor" in names and "FloatTensor" not in names


def _is_python(data: Any) -> bool:
    """True for numbers, and for lists of them: arrays and tensors have a dtype of their own."""
    while isinstance(data, (list, tuple)) and data:
        data = data[0]
    return type(data) in (bool, int, float, complex, list, tuple)
