"""Every operator and layer of which torch's own tests know arguments, called within a constructor.

``python -m tests.conformance.operators [--every N] [--samples N] [--only NAME …]``: a line for each that differs.

The arguments are first copied by recorded calls, so nothing has a value yet when the operator is called. What it gives
and what it leaves in its arguments is compared with the same done outside of any load: values bit by bit, dtypes,
strides, which of them share memory. What differs from run to run with another seed is compared for its looks alone.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves, tree_map

import weightlift as wl

# torch takes another path where a mode is on, and rounds otherwise: it asks LAPACK for vectors, or fuses no layers.
ROUNDED = {
    "linalg.svdvals", "linalg.eigvalsh", "linalg.cond", "linalg.matrix_norm", "linalg.norm", "norm.nuc",
    "nn.TransformerEncoderLayer", "nn.TransformerEncoder", "nn.MultiheadAttention",
}  # fmt: skip
# Uninitialised memory, or what differs from one call to the next whatever the seed.
UNDEFINED = {
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_", "resize_as_",
}  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


class Call(NamedTuple):
    """One call with its arguments; ``make`` gives what is called, in the constructor."""

    name: str
    make: Callable[[], Callable[..., Any]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool


class Holds(nn.Module):
    """Calls an operator in its constructor, and holds what that was given and what it gave."""

    def __init__(self, call: Call, *, read: bool) -> None:
        super().__init__()
        with torch.set_grad_enabled(call.grad):
            args, kwargs = tree_map(_recorded, (call.args, call.kwargs))
            called = call.make()
            results = called(*args, **kwargs)
        self.called = called if isinstance(called, nn.Module) else None
        held = [*tree_leaves(results), *tree_leaves((args, kwargs))]
        if self.called is not None:
            held += [*self.called.parameters(), *self.called.buffers()]
        self.tensors = [item for item in held if isinstance(item, torch.Tensor)]
        self.others = [item for item in held if isinstance(item, (bool, int, float, complex, torch.Size))]
        self.read = [_read(tensor) for tensor in self.tensors] if read else []


def _recorded(value: Any) -> Any:
    if type(value) is not torch.Tensor or value.layout is not torch.strided or not value.numel():
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    made.copy_(value.detach())
    return made.requires_grad_(value.requires_grad)


def _read(tensor: torch.Tensor) -> Any:
    plain = tensor.layout is torch.strided and tensor.numel() and not tensor.is_quantized
    return tensor.detach().flatten()[-1].item() if plain else None


def calls(dtype: torch.dtype, samples: int, *, every: int = 1, grad: bool = False) -> Iterator[Call]:
    """Of each operator and layer that takes ``dtype`` up to so many calls."""
    warnings.simplefilter("ignore")
    for info in op_db[::every]:
        if dtype not in info.dtypes:
            continue
        name = f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name
        for sample in itertools.islice(_samples(info, info.sample_inputs_func, dtype, grad), samples):
            args = (sample.input, *sample.args)
            yield Call(name, lambda info=info: info.op, args, sample.kwargs, grad)
            if info.inplace_variant is not None and not grad and not sample.broadcasts_input:
                yield Call(f"{name}_", lambda info=info: info.inplace_variant, args, sample.kwargs, grad)
    for info in module_db[::every]:
        if dtype not in info.dtypes:
            continue
        for sample in itertools.islice(_samples(info, info.module_inputs_func, dtype, grad, training=True), samples):
            built, given = sample.constructor_input, sample.forward_input
            if given is None:
                continue

            def make(info: Any = info, built: Any = built) -> nn.Module:
                return info.module_cls(*built.args, **{**built.kwargs, "dtype": dtype})  # type: ignore[no-any-return]

            yield Call(f"nn.{info.module_cls.__name__}", make, given.args, given.kwargs, grad)


def _samples(info: Any, make: Any, dtype: torch.dtype, grad: bool, **more: Any) -> Iterator[Any]:
    torch.manual_seed(0)
    try:
        yield from make(info, "cpu", dtype, grad, **more)
    except Exception:  # no samples of this dtype: torch's own tests skip it, too
        return


def difference(call: Call, *, read: bool) -> str | None:
    """What is not as ever; None if nothing is, or the call fails by itself."""
    try:
        torch.manual_seed(0)
        ordinary = Holds(call, read=read)
        torch.manual_seed(1)
        other = Holds(call, read=read)
    except Exception:
        return None
    sampled = any(_unlike(a, b, bits=True) for a, b in zip(ordinary.tensors, other.tensors))
    try:
        ours = wl.defer(lambda: Holds(call, read=read)).materialize()
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"
    if len(ours.tensors) != len(ordinary.tensors):
        return f"{len(ours.tensors)} tensors instead of {len(ordinary.tensors)}"
    found = [_unlike(a, b, bits=not sampled) for a, b in zip(ours.tensors, ordinary.tensors)]
    if any(found):
        return "; ".join(f"{place}: {what}" for place, what in enumerate(found) if what)
    if _shared(ours.tensors) != _shared(ordinary.tensors):
        return "other tensors share memory"
    if not sampled and repr(ours.others) != repr(ordinary.others):
        return f"{ours.others} instead of {ordinary.others}"
    if not sampled and repr(ours.read) != repr(ordinary.read):
        return f"read {ours.read} instead of {ordinary.read}"
    return None


def _unlike(ours: torch.Tensor, theirs: torch.Tensor, *, bits: bool) -> str | None:
    for what in ("shape", "dtype", "layout", "requires_grad"):
        if getattr(ours, what) != getattr(theirs, what):
            return f"{what} {getattr(ours, what)} instead of {getattr(theirs, what)}"
    if ours.layout is not torch.strided or not ours.numel():
        return None
    if ours.stride() != theirs.stride():
        return f"stride {ours.stride()} instead of {theirs.stride()} of {tuple(ours.shape)}"
    if (ours.is_conj(), ours.is_neg()) != (theirs.is_conj(), theirs.is_neg()):
        return "another lazy view"
    if not bits:
        return None
    ours, theirs = ours.detach().resolve_conj().resolve_neg(), theirs.detach().resolve_conj().resolve_neg()
    if ours.is_quantized:
        ours, theirs = ours.int_repr(), theirs.int_repr()
    same = (ours == theirs) | ((ours != ours) & (theirs != theirs))
    return None if bool(same.all()) else f"{int((~same).sum())} other values of {tuple(ours.shape)}"


def _shared(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    storages = [_storage(tensor) for tensor in tensors]
    return [
        (a, b) for a, b in itertools.combinations(range(len(tensors)), 2) if storages[a] and storages[a] == storages[b]
    ]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided and tensor.numel() else 0


def differences(
    dtype: torch.dtype, *, samples: int, every: int = 1, grad: bool = False, read: bool = False, only: Any = ()
) -> tuple[int, list[str]]:
    """How many calls were compared, and a line for each operator that differs."""
    count, found = 0, {}
    for call in calls(dtype, samples, every=every, grad=grad):
        base = call.name.removesuffix("_")
        if (only and call.name not in only) or base in UNDEFINED:
            continue
        count += 1
        what = difference(call, read=read)
        if what is not None and not (base in ROUNDED and "other values" in what):
            found.setdefault(call.name, what)
    return count, [f"{dtype} {name}: {what[:300]}" for name, what in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="of so many operators one")
    parser.add_argument("--samples", type=int, default=4, help="calls of each at most")
    parser.add_argument("--only", nargs="*", default=())
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype, grad, read in itertools.product(DTYPES, (False, True), (False, True)):
        count, found = differences(
            dtype, samples=options.samples, every=options.every, grad=grad, read=read, only=options.only
        )
        print(f"{dtype}, grad {grad}, read {read}: {count} calls, {len(found)} operators differ", flush=True)
        for line in found:
            print("  ", line, flush=True)


if __name__ == "__main__":
    main()
