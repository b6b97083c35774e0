"""What a call's results will look like: shapes, dtypes and strides, without running it.

What initialisers are made of has a rule here. For everything else the call is tried on torch's ``meta`` device, which
knows all operators, but whose first use in a process imports a good part of the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch

from weightlift.deferred.schema import is_bounded
from weightlift.strides import row_major

_Tensor = torch.Tensor
_aten = torch.ops.aten
_PLAIN = {bool, int, float, complex, str, type(None), torch.dtype, torch.layout, torch.memory_format}
_FLOATING = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


class Result(NamedTuple):
    """One tensor to come. ``stride`` None is row-major."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


def infer(func: Any, args: Any, kwargs: Any) -> list[Result] | None:
    """The results of a call in order; None when they depend on values, or can't be told."""
    rule = _RULES.get(func._schema.name)
    if rule is not None:
        found = rule(args, kwargs)
        if found is not None:
            return found or None
    return _tried_on_meta(func, args, kwargs)


def is_short_range(func: Any, args: Any, elements: int) -> bool:
    """True for an ``arange`` or ``linspace`` of up to ``elements`` numbers."""
    name = func._schema.name
    if name == "aten::arange":
        start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
        return bool((end - start) / (step or 1) <= elements)
    return name in ("aten::linspace", "aten::logspace") and bool(args[2] <= elements)


def _broadcast(args: Any, kwargs: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of a pointwise call on row-major floating-point tensors of one dtype, and numbers."""
    if any(isinstance(value, _Tensor) for value in kwargs.values()):
        return None
    shapes = []
    dtype = None
    for value in args:
        if isinstance(value, _Tensor):
            if value.dtype not in _FLOATING or dtype not in (None, value.dtype) or not value.is_contiguous():
                return None
            if value.device.type != "cpu" or type(value) not in (_Tensor, torch.nn.Parameter):
                return None
            dtype = value.dtype
            shapes.append(value.shape)
        elif not isinstance(value, (int, float, type(None))):
            return None
    if dtype is None:
        return None
    if len(shapes) == 1:
        return tuple(shapes[0]), dtype
    if len({len(shape) for shape in shapes}) > 1:
        return None
    extents = [{extent for extent in column if extent != 1} for column in zip(*shapes)]
    if any(len(extent) > 1 for extent in extents):
        return None  # the call itself will say what is wrong
    return tuple(extent.pop() if extent else 1 for extent in extents), dtype


def _elementwise(args: Any, kwargs: Any) -> list[Result] | None:
    if kwargs.keys() - {"alpha"}:
        return None
    found = _broadcast(args, kwargs)
    return None if found is None else [Result(*found)]


def _clamped(args: Any, kwargs: Any) -> list[Result] | None:
    return _elementwise(args, kwargs) if is_bounded(args, kwargs) else None


def _comparison(args: Any, kwargs: Any) -> list[Result] | None:
    found = _broadcast(args, kwargs)
    return None if found is None else [Result(found[0], torch.bool)]


def _copy_of(args: Any, kwargs: Any) -> list[Result] | None:
    """``clone`` and ``to``: the layout is kept where it is dense."""
    tensor = args[0]
    if not isinstance(tensor, _Tensor):  # a number, as vmap hands on what it closes over
        return None
    if kwargs.get("device") is not None or kwargs.get("layout") is not None or kwargs.get("pin_memory"):
        return None
    memory_format = kwargs.get("memory_format") or torch.preserve_format
    dtype = kwargs.get("dtype") or tensor.dtype
    if tensor.is_contiguous() and memory_format in (torch.preserve_format, torch.contiguous_format):
        return [Result(tuple(tensor.shape), dtype)]
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    copied = torch.empty_like(meta, dtype=dtype, memory_format=memory_format)
    return [Result(tuple(copied.shape), dtype, tuple(copied.stride()))]


def _qr(args: Any, kwargs: Any) -> list[Result] | None:
    """Reduced mode, as LAPACK leaves it: both factors column-major."""
    matrix = args[0]
    if len(args) > 1 or kwargs or matrix.dim() != 2 or min(matrix.shape) == 0:
        return None
    rows, columns = matrix.shape
    rank = min(rows, columns)
    return [
        Result((rows, rank), matrix.dtype, (1, rows)),
        Result((rank, columns), matrix.dtype, (1, rank)),
    ]


def _svd(args: Any, kwargs: Any) -> list[Result] | None:
    """As LAPACK leaves it: both factors column-major. On ``meta`` the second one is not."""
    matrix, whole, factors = args[0], args[1:2] == (True,), args[2:3] != (False,)
    if kwargs or matrix.dim() < 2 or not factors:
        return None
    *batch, rows, columns = matrix.shape
    rank = min(rows, columns)
    return [
        _column_major((*batch, rows, rows if whole else rank), matrix.dtype),
        Result((*batch, rank), matrix.dtype.to_real()),
        _column_major((*batch, columns if whole else rank, columns), matrix.dtype),
    ]


def _eig(args: Any, kwargs: Any) -> list[Result] | None:
    matrix = args[0]
    if len(args) > 1 or kwargs or matrix.dim() < 2:
        return None
    dtype = matrix.dtype.to_complex()
    return [Result(tuple(matrix.shape[:-1]), dtype), _column_major(tuple(matrix.shape), dtype)]


def _column_major(shape: tuple[int, ...], dtype: torch.dtype) -> Result:
    """Each matrix by its columns, the batch before them row by row."""
    *batch, rows, columns = shape
    return Result(shape, dtype, (*row_major((*batch, rows * columns))[:-1], 1, rows))


def _fft(args: Any, kwargs: Any) -> list[Result] | None:
    """Over several dimensions their order decides, in another way than on ``meta``: it is told by running it."""
    return [] if kwargs or len(args[1]) > 1 else None


def _diagonal(args: Any, kwargs: Any) -> list[Result] | None:
    matrix = args[0]
    offset = args[1] if len(args) > 1 else 0
    if len(args) > 2 or kwargs or matrix.dim() != 2:
        return None
    rows, columns = matrix.shape
    return [Result((max(0, min(rows + min(offset, 0), columns - max(offset, 0))),), matrix.dtype)]


def _triangle(args: Any, kwargs: Any) -> list[Result] | None:
    tensor = args[0]
    return [Result(tuple(tensor.shape), tensor.dtype)] if tensor.is_contiguous() else None


def _joined(args: Any, kwargs: Any) -> list[Result] | None:
    """``cat`` of row-major tensors of one dtype."""
    tensors = args[0]
    dim = args[1] if len(args) > 1 else 0
    first = tensors[0]
    if kwargs or any(
        tensor.dtype != first.dtype or tensor.dim() != first.dim() or not tensor.is_contiguous() for tensor in tensors
    ):
        return None
    shape = list(first.shape)
    if not shape:
        return None
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return [Result(tuple(shape), first.dtype)]


def _permutation(args: Any, kwargs: Any) -> list[Result] | None:
    return [Result((args[0],), kwargs.get("dtype") or torch.int64)]


# None: `meta` is asked. Nothing at all: it is not to be told.
_Rule = Callable[[Any, Any], "list[Result] | None"]
_ELEMENTWISE = (
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "pow",
    "reciprocal", "sin", "cos", "tan", "tanh", "sigmoid", "erf", "erfinv", "clamp_min", "clamp_max", "square",
    "sign", "floor", "ceil", "round", "relu", "softplus",
)  # fmt: skip
_RULES: dict[str, _Rule] = {
    **{f"aten::{name}": _elementwise for name in _ELEMENTWISE},
    **{f"aten::{name}": _comparison for name in ("lt", "gt", "le", "ge", "eq", "ne", "isnan", "isfinite", "isinf")},
    "aten::clamp": _clamped,
    "aten::clone": _copy_of,
    "aten::_to_copy": _copy_of,
    "aten::linalg_qr": _qr,
    "aten::_linalg_svd": _svd,
    "aten::linalg_eig": _eig,
    "aten::_fft_r2c": _fft,
    "aten::_fft_c2r": _fft,
    "aten::diagonal_copy": _diagonal,
    "aten::tril": _triangle,
    "aten::triu": _triangle,
    "aten::cat": _joined,
    "aten::randperm": _permutation,
}


class _Form(NamedTuple):
    """What a call is told of one argument that is, or holds, a tensor: enough to make its like on ``meta``."""

    kind: type
    parts: tuple[Any, ...]


# By the call and the forms of its arguments: layers repeat their calls, and one that torch tells in Python takes most
# of a millisecond.
_told: dict[object, list[Result] | None] = {}
_UNKNOWN: list[Result] = []
_MOST_TOLD = 4096
_LONG = 64
_TORCHS_OWN = ("aten", "prims")  # what others tell may depend on anything


def _tried_on_meta(func: Any, args: Any, kwargs: Any) -> list[Result] | None:
    try:
        # What is made without a dtype gets the default one.
        call = func, _form(args), _form(kwargs), torch.get_default_dtype()
        known = _told.get(call, _UNKNOWN)
        if known is not _UNKNOWN:
            return known
        found = _results(func, _meta(call[1]), _meta(call[2]))
    except Exception:  # no meta kernel, or the shape depends on values: the caller runs the call for real
        return None
    short = all(len(item) <= _LONG for item in (found or (), *args) if isinstance(item, (tuple, list)))
    if short and func.namespace in _TORCHS_OWN:
        if len(_told) >= _MOST_TOLD:
            _told.clear()
        _told[call] = found
    return found


def _results(func: Any, args: Any, kwargs: Any) -> list[Result] | None:
    results = func(*args, **kwargs)
    outputs = list(results) if isinstance(results, (tuple, list)) else [results]
    if all(isinstance(out, _Tensor) and out.layout is torch.strided and out.is_meta for out in outputs):
        return [Result(tuple(out.shape), out.dtype, tuple(out.stride())) for out in outputs]
    return None


def _form(value: Any) -> Any:
    """What a call is told of its arguments, to be hashed. Numbers with their type: 1 and 1.0 give other dtypes."""
    if isinstance(value, _Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.device.type not in ("cpu", "meta"):
            raise NotImplementedError
        return _Form(_Tensor, (tuple(value.shape), value.stride(), value.dtype))
    if isinstance(value, torch.device):
        if value.type != "cpu":
            raise NotImplementedError
        return _Form(torch.device, ())
    if isinstance(value, dict):
        if value.get("pin_memory"):
            raise NotImplementedError
        items = ((name, _form(torch.device("cpu") if name == "device" and item is None else item))
                 for name, item in value.items())  # fmt: skip
        return _Form(dict, tuple(items))
    if isinstance(value, (tuple, list)):
        return _Form(type(value), tuple(map(_form, value)))
    if type(value) not in _PLAIN:  # a scripted object, which holds memory
        raise NotImplementedError
    return _Form(object, (type(value), value))


def _meta(form: _Form) -> Any:
    kind, parts = form
    if kind is _Tensor:
        shape, stride, dtype = parts
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if kind is torch.device:
        return torch.device("meta")
    if kind is dict:
        return {name: _meta(item) for name, item in parts}
    if kind is object:
        return parts[1]
    return kind(map(_meta, parts))
