"""The names that a torch pickle may use, and the inert records that stand for them.

The list is that of ``torch.load(weights_only=True)``. Nothing here imports or calls what a pickle names: a rebuild
function makes a `TensorRef`, which tells what it would have built, or `Opaque` for tensors that are no plain bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch


class ForbiddenGlobalError(Exception):
    """The pickle names something that is not on the weights-only list: loading it would run code."""


class BrokenPickleError(Exception):
    """The pickle is not one that torch.save writes."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name on the list, standing for itself."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class, by the dtype of its elements."""

    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of the file: its record key, the dtype and count of its elements, where a view of it begins."""

    key: str
    dtype: torch.dtype
    numel: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor over a storage; offset and strides in elements of ``dtype``."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Opaque:
    """Something that torch could rebuild but that isn't a plain run of bytes; ``what`` says what it is, ``hint`` what
    to do about it."""

    what: str
    hint: str | None = None


_ALIASES = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}
_PARAMETER = "torch.nn.parameter.Parameter"
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_COUNTS = 2**63
_OF_RANKS = ("torch.distributed.tensor.", "torch.distributed._tensor.", "torch.distributed._shard.")
_GATHER = (
    "one rank's part of tensors that several hold: save them with torch.distributed.checkpoint, or torch.save what "
    "get_model_state_dict gathers with StateDictOptions(full_state_dict=True)"
)
_BY_TORCH = "pass the mapping that torch.load makes of the file"  # of which an error may then say more
_STORAGES: Mapping[str, StorageType] = MappingProxyType(
    {
        name: StorageType(dtype)
        for name, dtype in {
            "QInt8Storage": torch.qint8,
            "QUInt8Storage": torch.quint8,
            "QInt32Storage": torch.qint32,
            "QUInt4x2Storage": torch.quint4x2,
            "QUInt2x4Storage": torch.quint2x4,
            "DoubleStorage": torch.float64,
            "FloatStorage": torch.float32,
            "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16,
            "LongStorage": torch.int64,
            "IntStorage": torch.int32,
            "ShortStorage": torch.int16,
            "CharStorage": torch.int8,
            "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool,
            "ComplexFloatStorage": torch.complex64,
            "ComplexDoubleStorage": torch.complex128,
            "UntypedStorage": torch.uint8,
        }.items()
    }
)
_QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})
_STORAGE_MODULES = frozenset({"torch", "torch.cuda", "torch.storage"})
_OPAQUE: Mapping[str, str] = MappingProxyType(
    {
        "torch._utils._rebuild_qtensor": "a quantised tensor",
        "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
        "torch._utils._rebuild_nested_tensor": "a nested tensor",
        "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
        "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on meta, without values",
        "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device that stores no bytes",
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a device that stores no bytes",
    }
)
_QSCHEMES = frozenset(
    f"torch.{name}"
    for name in (
        "per_tensor_affine",
        "per_tensor_symmetric",
        "per_channel_affine",
        "per_channel_symmetric",
        "per_channel_affine_float_qparams",
    )
)


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(map(is_integer, values)):
        raise BrokenPickleError("a shape or stride that is not integers")
    return tuple(values)


def is_integer(value: Any) -> bool:
    """Whether it is one that a count may be. Others Python may refuse to write in digits."""
    return type(value) is int and -_COUNTS < value < _COUNTS


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, metadata: Any) -> TensorRef | Opaque:
    if not isinstance(storage, StorageRef) or not is_integer(offset) or not isinstance(dtype, torch.dtype):
        raise BrokenPickleError("a tensor without a storage, an offset or a dtype")
    if dtype in _QUANTISED:
        return Opaque("a quantised tensor", _BY_TORCH)
    if metadata and not isinstance(metadata, dict):
        raise BrokenPickleError("a tensor's metadata that are not a mapping")
    if metadata and any(metadata.values()):
        return Opaque("a conjugated or negated view", "save tensor.resolve_conj().resolve_neg()")
    return TensorRef(storage, dtype, offset, _integers(size), _integers(stride))


def _require_bool(value: Any) -> None:
    if type(value) is not bool:
        raise BrokenPickleError("a requires_grad that is not a boolean")


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef | Opaque:
    return _tensor(storage, offset, size, stride, getattr(storage, "dtype", None), None)


def _rebuild_v2(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, _hooks: Any, metadata: Any = None
) -> Any:
    _require_bool(grad)
    return _tensor(storage, offset, size, stride, getattr(storage, "dtype", None), metadata)


def _rebuild_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    _require_bool(grad)
    return _tensor(storage, offset, size, stride, dtype, metadata)


def _parameter(data: Any = None, *_: Any) -> Any:
    if not isinstance(data, (TensorRef, Opaque)):
        raise BrokenPickleError("a parameter without a tensor")
    return data


def _from_type(function: Any, kind: Any, args: Any, _state: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(args, tuple) or not isinstance(kind, Global):
        raise BrokenPickleError("a tensor subclass that is not described")
    if function.name == _FROM_TYPE:
        raise BrokenPickleError("a tensor subclass within another")
    return reduce(function, args)


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((hashable(key), value) for key, value in pairs)


def _counter(counts: Any = MappingProxyType({})) -> dict[Any, Any]:
    pairs = counts.items() if isinstance(counts, Mapping) else counts
    return {hashable(key): value for key, value in pairs}


def _layout(name: Any) -> Opaque:
    if type(name) is not str:
        raise BrokenPickleError("a layout whose name is not text")
    return Opaque(f"the layout {name:.100}")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise BrokenPickleError("bytes that are not encoded as latin1")
    return text.encode("latin1")


def _bytearray(data: Any = b"", encoding: Any = "latin1") -> bytearray:
    # Never an integer, which would ask for that many bytes.
    return bytearray(data if type(data) is bytes else _encode(data, encoding))


def _set(items: Any = ()) -> set[Any]:
    return {hashable(item) for item in items}


def _complex(real: Any, imaginary: Any) -> complex:
    return complex(float(real), float(imaginary))


def _size(values: Any = ()) -> torch.Size:
    return torch.Size(_integers(values))


def _device(kind: Any, index: Any = None) -> torch.device:
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)
    except RuntimeError as error:
        raise BrokenPickleError("a device that torch does not know") from error


_REDUCERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "collections.OrderedDict": _ordered,
        "collections.Counter": _counter,
        "torch._utils._rebuild_tensor": _rebuild,
        "torch._utils._rebuild_tensor_v2": _rebuild_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_v3,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        _PARAMETER: _parameter,
        _FROM_TYPE: _from_type,
        "torch.serialization._get_layout": _layout,
        "torch.Size": _size,
        "torch.device": _device,
        "_codecs.encode": _encode,
        "builtins.bytearray": _bytearray,
        "builtins.set": _set,
        "builtins.complex": _complex,
    }
)


def hint_for(name: str) -> str | None:
    """What to do about a name that is not on the list, where there is something better than to do without code."""
    return _GATHER if name.startswith(_OF_RANKS) else None


def find(module: str, name: str) -> Any:
    """The inert stand-in for a global of the weights-only list; `ForbiddenGlobalError` for every other."""
    module = _ALIASES.get(module, module)
    full = f"{module}.{name}"
    if module in _STORAGE_MODULES and name in _STORAGES:
        return _STORAGES[name]
    if full in _REDUCERS or full in _OPAQUE or full == "torch.Tensor":
        return Global(full)
    if full in _QSCHEMES:
        return Opaque(f"the quantisation scheme {full}")
    if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
        return dtype
    raise ForbiddenGlobalError(full[:200])


def reduce(function: Any, args: Any) -> Any:
    """The inert stand-in for what a call makes, of the stand-ins of a function and its arguments."""
    if not isinstance(function, Global) or type(args) is not tuple:
        raise BrokenPickleError("a call of something that is not a function")
    if function.name in _OPAQUE:
        return Opaque(_OPAQUE[function.name], _BY_TORCH)
    if function.name not in _REDUCERS:
        raise BrokenPickleError(f"a call of {function.name}")
    return _REDUCERS[function.name](*args)


def hashable(key: Any) -> Any:
    """Only flat keys, since hashing a tuple of a million levels would overflow the C stack, and no integers but those
    of 64 bits, of which hardly any have the same hash."""
    flat = key if type(key) is tuple else (key,)
    for part in flat:
        if type(part) not in (str, int, float, bool, bytes, type(None)):
            raise BrokenPickleError(f"a key of type {type(key).__name__}")
        if type(part) is int and not is_integer(part):
            raise BrokenPickleError("a key that is an integer of more than 64 bits")
    return key
