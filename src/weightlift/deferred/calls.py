"""What kind of call an ATen operator is, read off its schema once: does it alias, write, sample, make something new?"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten


class Kind(enum.Enum):
    """How the recorder treats a call."""

    VIEW = enum.auto()  # aliases its input or only changes a tensor's geometry: run as it is
    BIRTH = enum.auto()  # a factory: reserve memory, record how to fill it
    WRITE = enum.auto()  # changes a tensor argument in place, `out=` included
    PURE = enum.auto()  # makes new tensors from its arguments
    VALUE = enum.auto()  # gives something that is no tensor, or nothing at all: needs the values now
    RESIZE = enum.auto()
    BATCH_NORM = enum.auto()  # writes its running statistics, and does not say so


@dataclass(frozen=True, slots=True)
class Call:
    """One operator: its kind, whether it samples, where it writes and whether it overwrites all it writes to."""

    kind: Kind
    random: bool = False
    written: tuple[int | str, ...] = ()
    overwrites: bool = False
    alone: bool = False  # its only tensor argument is the one it writes to
    pointwise: bool = False


# What these write, beside what their schemas say: running statistics, which may be None.
_UNDECLARED: dict[str, tuple[int | str, ...]] = {
    "aten::native_batch_norm": (3, 4), "aten::cudnn_batch_norm": (3, 4), "aten::miopen_batch_norm": (3, 4),
    "aten::batch_norm_update_stats": (1, 2), "aten::batch_norm_gather_stats": (3, 4),
    "aten::batch_norm_gather_stats_with_counts": (3, 4),
}  # fmt: skip
# What these give lies in their argument's memory, which the schemas of some keep to themselves.
_VIEWS = {"aten::set_", "aten::detach_", "aten::unsafe_split", "aten::unsafe_split_with_sizes"}
# In place operators that define every element of their first argument without looking at it.
_OVERWRITING = {
    "aten::normal_", "aten::uniform_", "aten::zero_", "aten::fill_", "aten::copy_", "aten::random_",
    "aten::exponential_", "aten::bernoulli_", "aten::log_normal_", "aten::cauchy_", "aten::geometric_",
}  # fmt: skip


def classify(func: Any) -> Call:
    """Read the schema of an operator overload. Unknown shapes of schema are taken for calls that need values now."""
    schema = func._schema
    name = schema.name
    random = torch.Tag.nondeterministic_seeded in func.tags
    if name == "aten::resize_":
        return Call(Kind.RESIZE)
    if name in _UNDECLARED and schema.overload_name != "out":
        kind = Kind.BATCH_NORM if name == "aten::native_batch_norm" else Kind.VALUE
        return Call(kind, random, _UNDECLARED[name])
    if torch.Tag.inplace_view in func.tags or name in _VIEWS:
        return Call(Kind.VIEW)
    written = tuple(
        argument.name if argument.kwarg_only else index
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    if written and any(_is_new(result) for result in schema.returns):
        return Call(Kind.VALUE, random, written)  # as rrelu_with_noise: what it returns is none of what it writes
    if written:
        overwrites = name in _OVERWRITING or (schema.overload_name == "out" and name == "aten::eye")
        tensors = sum("Tensor" in str(argument.type) for argument in schema.arguments)
        alone = tensors == 1 and written == (0,) and len(schema.returns) == 1
        return Call(Kind.WRITE, random, written, overwrites, alone, torch.Tag.pointwise in func.tags)
    if not schema.returns or any(not _gives_tensors(result.type) for result in schema.returns):
        return Call(Kind.VALUE, random)
    if name.startswith("aten::quantize_"):  # on torch's ``meta`` device its result is not quantised
        return Call(Kind.VALUE)
    if any(result.alias_info is not None for result in schema.returns):
        return Call(Kind.VIEW)
    return Call(Kind.PURE, random, pointwise=torch.Tag.pointwise in func.tags)


@functools.cache
def seeded_variant(func: Any) -> Any:
    """The overload of a sampling operator that takes a generator: itself, a sibling, or None if there is none."""
    wanted = [argument.name for argument in func._schema.arguments]
    if "generator" in wanted:
        return func
    packet = func.overloadpacket
    for name in packet.overloads():
        sibling = getattr(packet, name)
        names = [argument.name for argument in sibling._schema.arguments]
        if "generator" in names and [item for item in names if item != "generator"] == wanted:
            return sibling
    return None


_WITHOUT_TENSORS = {int, float, bool, str, type(None), torch.dtype, torch.device}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor among the arguments of a call, lists and mappings included."""
    found: list[torch.Tensor] = []
    waiting = [value]
    for item in waiting:  # which grows meanwhile
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif type(item) not in _WITHOUT_TENSORS:
            if isinstance(item, (tuple, list)):
                waiting += item
            elif isinstance(item, dict):
                waiting += item.values()
    return found


def may_grow(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a pointwise call on small tensors may give a large one, as a table comes of two vectors."""
    return len({tensor.shape for tensor in tensors if not tensor.is_nested and tensor.dim()}) > 1


def _gives_tensors(kind: Any) -> bool:
    return str(kind) in ("Tensor", "List[Tensor]")


def _is_new(result: Any) -> bool:
    return result.alias_info is None and _gives_tensors(result.type)


class Birth(NamedTuple):
    """A factory rewritten as reserved memory plus, at most, one in-place call that fills it."""

    size: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format | None = None
    stride: tuple[int, ...] | None = None
    fill: Callable[..., Any] | None = None
    fill_args: tuple[Any, ...] = ()
    random: bool = False


# What a tensor over reserved memory can be of: quantised ones need a quantiser as well.
DTYPES = frozenset(
    value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith(("qint", "quint"))
)


def is_plain_birth(args: Any, kwargs: dict[str, Any]) -> bool:
    """True for a factory call that makes an ordinary, strided CPU tensor."""
    device = kwargs.get("device")
    dtype = kwargs.get("dtype")
    if dtype is None and args and isinstance(args[0], torch.Tensor):
        dtype = args[0].dtype
    return (
        (dtype is None or dtype in DTYPES)
        and (device is None or device.type == "cpu")
        and kwargs.get("layout", torch.strided) in (None, torch.strided)
        and not kwargs.get("pin_memory")
        and not (args and isinstance(args[0], torch.Tensor) and args[0].device.type != "cpu")
    )


def _factory_dtype(kwargs: dict[str, Any]) -> torch.dtype:
    return kwargs.get("dtype") or torch.get_default_dtype()


def _empty(size: Any, **kwargs: Any) -> Birth:
    return Birth(tuple(size), _factory_dtype(kwargs), kwargs.get("memory_format"))


def _empty_strided(size: Any, stride: Any, **kwargs: Any) -> Birth:
    return Birth(tuple(size), _factory_dtype(kwargs), stride=tuple(stride))


def _ones(size: Any, **kwargs: Any) -> Birth:
    return Birth(tuple(size), _factory_dtype(kwargs), fill=aten.fill_.Scalar, fill_args=(1,))


def _full(size: Any, value: Any, **kwargs: Any) -> Birth:
    dtype = kwargs.get("dtype")
    if dtype is None:
        if isinstance(value, bool):
            dtype = torch.bool
        elif isinstance(value, int):
            dtype = torch.int64
        elif isinstance(value, complex):
            dtype = torch.get_default_dtype().to_complex()
        else:
            dtype = torch.get_default_dtype()
    return Birth(tuple(size), dtype, fill=aten.fill_.Scalar, fill_args=(value,))


def _rand(size: Any, **kwargs: Any) -> Birth:
    return Birth(tuple(size), _factory_dtype(kwargs), fill=aten.uniform_.default, fill_args=(0.0, 1.0), random=True)


def _randn(size: Any, **kwargs: Any) -> Birth:
    return Birth(tuple(size), _factory_dtype(kwargs), fill=aten.normal_.default, fill_args=(0.0, 1.0), random=True)


def _randint(low: Any, high: Any, size: Any, **kwargs: Any) -> Birth:
    dtype = kwargs.get("dtype") or torch.int64
    return Birth(tuple(size), dtype, fill=getattr(aten.random_, "from"), fill_args=(low, high), random=True)


def _new_empty(like: torch.Tensor, size: Any, **kwargs: Any) -> Birth:
    return Birth(tuple(size), kwargs.get("dtype") or like.dtype)


def _new_empty_strided(like: torch.Tensor, size: Any, stride: Any, **kwargs: Any) -> Birth:
    return Birth(tuple(size), kwargs.get("dtype") or like.dtype, stride=tuple(stride))


def _new_full(like: torch.Tensor, size: Any, value: Any, **kwargs: Any) -> Birth:
    return Birth(tuple(size), kwargs.get("dtype") or like.dtype, fill=aten.fill_.Scalar, fill_args=(value,))


def _like(fill: Any = None, args: tuple[Any, ...] = (), random: bool = False) -> Callable[..., Birth]:
    def birth(like: torch.Tensor, *rest: Any, **kwargs: Any) -> Birth:
        dtype = kwargs.get("dtype") or like.dtype
        memory_format = kwargs.get("memory_format")
        stride = None
        if memory_format in (None, torch.preserve_format):
            memory_format = None
            if not like.is_contiguous():
                stride = torch.empty_like(torch.empty_strided(like.shape, like.stride(), device="meta")).stride()
        return Birth(tuple(like.shape), dtype, memory_format, stride, fill, (*args, *rest), random)

    return birth


def _randint_like(like: torch.Tensor, low: Any, high: Any, **kwargs: Any) -> Birth:
    return _like(getattr(aten.random_, "from"), (low, high), random=True)(like, **kwargs)


BIRTHS: dict[Any, Callable[..., Birth]] = {
    aten.empty.memory_format: _empty,
    aten.empty_strided.default: _empty_strided,
    aten.zeros.default: _empty,  # reserved memory reads as zeros
    aten.ones.default: _ones,
    aten.full.default: _full,
    aten.rand.default: _rand,
    aten.randn.default: _randn,
    aten.randint.default: lambda high, size, **kwargs: _randint(0, high, size, **kwargs),
    aten.randint.low: _randint,
    aten.new_empty.default: _new_empty,
    aten.new_empty_strided.default: _new_empty_strided,
    aten.new_zeros.default: _new_empty,
    aten.new_ones.default: lambda like, size, **kwargs: _new_full(like, size, 1, **kwargs),
    aten.new_full.default: _new_full,
    aten.empty_like.default: _like(),
    aten.zeros_like.default: _like(),
    aten.ones_like.default: _like(aten.fill_.Scalar, (1,)),
    aten.full_like.default: _like(aten.fill_.Scalar),
    aten.rand_like.default: _like(aten.uniform_.default, (0.0, 1.0), random=True),
    aten.randn_like.default: _like(aten.normal_.default, (0.0, 1.0), random=True),
    aten.randint_like.default: lambda like, high, **kwargs: _randint_like(like, 0, high, **kwargs),
    aten.randint_like.low_dtype: _randint_like,
}

KINDS: dict[Any, Call] = {}


def call_of(func: Any) -> Call:
    """`classify`, remembered. Two threads may both compute an entry; both compute the same."""
    call = KINDS.get(func)
    if call is None:
        call = Call(Kind.BIRTH) if func in BIRTHS else classify(func)
        KINDS[func] = call
    return call
