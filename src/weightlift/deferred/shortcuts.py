"""The few calls that constructors are made of, recorded where they are made and not on the way down to ATen.

Nearly every parameter is born by ``torch.empty`` and given its values by one of torch's initialisers; a call that comes
to the dispatcher costs several times what is recorded of it. Of torch's own initialisers some show themselves whole
(`torch.overrides.handle_torch_function`): these are recorded whole, so that ``kaiming_uniform_`` counts its fan when it
is replayed, if it ever is.

What is not as simple as it nearly always is goes the way of every call, also where it would raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weightlift.deferred.calls import DTYPES
from weightlift.deferred.recorder import Recorder

_aten = torch.ops.aten
_Tensor = torch.Tensor
_PLAIN = {_Tensor, nn.Parameter}
_NUMBERS = {int, float, bool}
_SIZES = {tuple, list, torch.Size}
_FLOATING = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
# In place, of nothing but numbers: the operator, and the values that are left out.
FILLS: dict[Any, tuple[Any, tuple[float, ...], bool]] = {
    _Tensor.zero_: (_aten.zero_.default, (), False),
    _Tensor.fill_: (_aten.fill_.Scalar, (), False),
    _Tensor.normal_: (_aten.normal_.default, (0.0, 1.0), True),
    _Tensor.uniform_: (_aten.uniform_.default, (0.0, 1.0), True),
}
_ONES = (_aten.fill_.Scalar, (1,))
# Arguments of ``kaiming_uniform_`` that it takes without a look at anything but the tensor's shape.
_MODES = ("fan_in", "fan_out")
_NONLINEARITIES = ("leaky_relu", "relu", "linear", "sigmoid", "tanh", "selu")
_LARGE = 1e9

_dispatch_modes = torch._C._len_torch_dispatch_stack
_dispatch_mode = torch._C._get_dispatch_stack_at
_function_modes = torch._C._len_torch_function_stack
_NoDispatch = torch._C._DisableTorchDispatch  # of this thread, for as long as the object lives
_transforming = torch._C._are_functorch_transforms_active
_tracing = torch._C._is_tracing

Handler = Callable[[Any, Any, Any, Any], Any]


def is_watched() -> bool:
    """True where something beside modes has to see a call on its way down: ``torch.func``, ``torch.jit.trace``."""
    return _transforming() or _tracing()


class Shortcuts:
    """The functions that handle calls: of one recorder, the torch function, its arguments and keyword arguments."""

    _recorder: Recorder

    def _empty(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``torch.empty(sizes, dtype=…)`` and ``torch.zeros``: reserved memory reads as zeros."""
        born = self._born(args, kwargs)
        return func(*args, **kwargs) if born is None else born

    def _ones(self, func: Any, args: Any, kwargs: Any) -> Any:
        born = self._born(args, kwargs, *_ONES)
        return func(*args, **kwargs) if born is None else born

    def _born(self, args: Any, kwargs: Any, fill: Any = None, values: tuple[Any, ...] = ()) -> torch.Tensor | None:
        """None where this is not all: options, odd sizes, or another mode below that has a say in it (a device's)."""
        size = args[0] if len(args) == 1 and type(args[0]) in _SIZES else args
        recorder = self._recorder
        if (
            not args
            or _function_modes() != 0
            or _dispatch_modes() != 1
            or _dispatch_mode(0) is not recorder  # within a nested scope it is another's
            or is_watched()
        ):
            return None
        numel = 1
        for extent in size:
            if type(extent) is not int or extent <= 0:
                return None
            numel *= extent
        dtype = None
        for name, value in kwargs.items():
            if value is not None:
                if name != "dtype":
                    return None
                dtype = value
        if dtype is None:
            dtype = torch.get_default_dtype() if recorder.default is None else recorder.default.wanted
        elif dtype not in DTYPES:  # ``dtype=bool`` among them, which torch knows as its own
            return None
        born: torch.Tensor = recorder.bear(size, numel, dtype, fill, values)
        return born

    def fill(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``tensor.fill_(1)`` and its like. Public: a handler that looks at such calls first ends here."""
        tensor = args[0]
        if (
            type(tensor) in _PLAIN
            and (not kwargs or (len(kwargs) == 1 and kwargs.get("generator", self) is None))
            and not (tensor.requires_grad and torch.is_grad_enabled())
        ):
            op, defaults, random = FILLS[func]
            if self._recorded(op, tensor, args[1:] + defaults[len(args) - 1 :], random):
                return tensor
        return func(*args, **kwargs)

    def _recorded(self, op: Any, tensor: Any, values: tuple[Any, ...], random: bool) -> bool:
        for value in values:
            if type(value) not in _NUMBERS:
                return False
        return (
            _dispatch_modes() == 1
            and not is_watched()
            and self._recorder.record_alone(op, tensor, values, random=random)
        )

    def _set_item(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``table[position, column] = number`` in memory that is written to at once: the calls it is made of take
        several times as long where a mode sees them."""
        if kwargs or len(args) != 3:
            return func(*args, **kwargs)
        tensor, index, value = args
        recorder = self._recorder
        if (
            type(tensor) in _PLAIN
            and isinstance(value, (int, float))  # numpy's double is one
            and (type(index) is int or (type(index) is tuple and all(type(item) is int for item in index)))
            and _dispatch_modes() == 1
            and _dispatch_mode(0) is recorder
            and _function_modes() == 0  # of the caller's, which may look at what has no values yet
            and not is_watched()
            and recorder.takes_writes(tensor)
        ):
            guard = _NoDispatch()
            try:
                return func(*args)
            finally:
                del guard
        return func(*args)

    # -- torch.nn.init, which calls a mode with everything by name and runs without autograd --------------------------

    def _uniform(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._sampled(func, args, kwargs, _aten.uniform_.default, "a", "b")

    def _normal(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._sampled(func, args, kwargs, _aten.normal_.default, "mean", "std")

    def _sampled(self, func: Any, args: Any, kwargs: Any, op: Any, first: str, second: str) -> Any:
        tensor = kwargs.get("tensor")
        if (
            type(tensor) in _PLAIN
            and kwargs.get("generator", self) is None
            and self._recorded(op, tensor, (kwargs.get(first), kwargs.get(second)), True)
        ):
            return tensor
        return func(*args, **kwargs)

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = kwargs.get("tensor")
        if type(tensor) in _PLAIN and self._recorded(_aten.fill_.Scalar, tensor, (kwargs.get("val"),), False):
            return tensor
        return func(*args, **kwargs)

    def _kaiming_uniform(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, a = kwargs.get("tensor"), kwargs.get("a")
        mode, nonlinearity = kwargs.get("mode"), kwargs.get("nonlinearity")
        if (
            type(tensor) in _PLAIN
            and (type(a) is float or type(a) is int)
            and -_LARGE < a < _LARGE
            and mode in _MODES
            and nonlinearity in _NONLINEARITIES
            and kwargs.get("generator", self) is None
            and tensor.dtype in _FLOATING
            and tensor.dim() >= 2
            and _dispatch_modes() == 1
            and not is_watched()
            and self._recorder.record_alone(func, tensor, (a, mode, nonlinearity), random=True)
        ):
            return tensor
        return func(*args, **kwargs)


def handlers() -> dict[Any, Handler]:
    """What handles which torch function, now."""
    functions: dict[Any, Handler] = {
        torch.empty: Shortcuts._empty, torch.zeros: Shortcuts._empty, torch.ones: Shortcuts._ones,
        _Tensor.__setitem__: Shortcuts._set_item, **dict.fromkeys(FILLS, Shortcuts.fill),
    }  # fmt: skip
    for name, handler in _INITIALISERS:
        function = getattr(nn.init, name)
        if function.__module__ == nn.init.__name__:  # Transformers puts its own there for a while
            functions[function] = handler
    return functions


_INITIALISERS: tuple[tuple[str, Handler], ...] = (
    ("kaiming_uniform_", Shortcuts._kaiming_uniform),
    ("uniform_", Shortcuts._uniform),
    ("normal_", Shortcuts._normal),
    ("constant_", Shortcuts._constant),
)
