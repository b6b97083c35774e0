"""Everything observable about a module: its tensors, wherever they are held, and how they share memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, np.generic)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


@dataclass
class Held:
    """One tensor (or numpy array, seen as a tensor) under one path."""

    path: str
    kind: str
    tensor: torch.Tensor
    owner: Any  # the object whose identity decides about ties


@dataclass
class Snapshot:
    held: dict[str, Held] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    def ties(self) -> set[tuple[str, ...]]:
        """Groups of paths that hold the same object."""
        groups: dict[int, list[str]] = {}
        for item in self.held.values():
            groups.setdefault(id(item.owner), []).append(item.path)
        return {tuple(sorted(g)) for g in groups.values() if len(g) > 1}

    def shared_memory(self) -> set[tuple[tuple[str, int], ...]]:
        """Groups of different objects in the same memory, each with its offset in bytes from the group's first."""
        spans = []
        seen: set[int] = set()
        for item in self.held.values():
            span = memory(item.tensor)
            if span is not None and id(item.owner) not in seen:
                seen.add(id(item.owner))
                spans.append((*span, item))
        spans.sort(key=lambda s: s[:2])
        clusters: list[list[Held]] = []
        end = -1
        for low, high, item in spans:
            if low >= end:
                clusters.append([])
            clusters[-1].append(item)
            end = max(end, high)
        result = set()
        for cluster in clusters:
            if len(cluster) > 1:
                base = min(i.tensor.data_ptr() for i in cluster)
                result.add(tuple(sorted((i.path, i.tensor.data_ptr() - base) for i in cluster)))
        return result


def memory(t: torch.Tensor) -> tuple[int, int] | None:
    """The half-open address range of the tensor's storage; None where it has none."""
    if t.layout != torch.strided or t.device.type != "cpu" or t.numel() == 0 or is_fake(t):
        return None
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def is_fake(t: torch.Tensor) -> bool:
    return type(t).__name__ == "FakeTensor"


def readable(t: torch.Tensor) -> bool:
    return t.device.type == "cpu" and not is_fake(t)


def walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Tensors, arrays, scalars and unregistered modules inside plain Python containers."""
    if isinstance(value, (torch.Tensor, np.ndarray, nn.Module, *SCALARS)):
        yield path, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, f"{path}[{key!r}]", seen)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from walk(inner, f"{path}[{index}]", seen)
    elif isinstance(value, SimpleNamespace) or type(value).__module__.startswith("conformance."):
        for key, inner in vars(value).items():
            yield from walk(inner, f"{path}.{key}", seen)


def take(module: nn.Module, extra: dict[str, Any] | None = None) -> Snapshot:
    """The snapshot of a module; `extra` adds what a case exposes besides (a table in an lru_cache, a global)."""
    snap = Snapshot(keys=list(module.state_dict().keys()))
    _take(module, "", snap, set())
    for path, value in walk(extra or {}, "extra", set()):
        _add(snap, path, "attribute", value, set())
    return snap


def _take(root: nn.Module, prefix: str, snap: Snapshot, seen: set[int]) -> None:
    for name, module in root.named_modules(remove_duplicate=False):
        here = prefix + name
        dot = f"{here}." if here else ""
        snap.modules[here or "(the module)"] = {
            "type": type(module).__qualname__,
            "training": module.training,
            "hooks": {h: len(getattr(module, h)) for h in HOOKS},
            "attributes": sorted(k for k in vars(module) if not k.startswith("__")),
        }
        for key, p in module._parameters.items():
            if p is not None:
                _add(snap, dot + key, "parameter", p, seen)
        for key, b in module._buffers.items():
            if b is not None:
                kept = key in module._non_persistent_buffers_set
                _add(snap, dot + key, "non-persistent buffer" if kept else "buffer", b, seen)
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules", "training") or key in HOOKS:
                continue
            if key.startswith("_") and isinstance(value, dict | set | bool):
                continue
            for path, inner in walk(value, dot + key, set()):
                _add(snap, path, "attribute", inner, seen)


def _add(snap: Snapshot, path: str, kind: str, value: Any, seen: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        snap.held[path] = Held(path, kind, value, value)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "biufc":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                snap.held[path] = Held(path, "numpy array", torch.from_numpy(value), value)
    elif isinstance(value, nn.Module):
        if id(value) not in seen:
            seen.add(id(value))
            _take(value, path + ":", snap, seen)
    else:
        snap.scalars[path] = value


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor's values as rows of bytes, in logical order."""
    t = t.detach()
    if t.is_quantized:
        t = t.int_repr()
    if t.layout != torch.strided:
        t = t.to_dense()
    t = t.resolve_conj().resolve_neg().contiguous()
    if t.numel() == 0:
        return torch.empty(0, t.element_size(), dtype=torch.uint8)
    return t.reshape(-1).view(torch.uint8).reshape(t.numel(), -1)


def numbers(t: torch.Tensor) -> torch.Tensor:
    """The tensor's values in float64, in logical order; complex ones as pairs."""
    t = t.detach()
    if t.is_quantized:
        t = t.dequantize()
    if t.layout != torch.strided:
        t = t.to_dense()
    t = t.resolve_conj().resolve_neg()
    if t.is_complex():
        t = torch.view_as_real(t)
    elif t.is_floating_point() and t.element_size() == 1:
        t = t.float()
    return t.reshape(-1).double()


def facts(t: torch.Tensor, *, fresh: bool) -> dict[str, Any]:
    """What must be the same about a tensor besides its values; `fresh`: right after construction, nothing assigned."""
    strided = t.layout == torch.strided
    result: dict[str, Any] = {
        "type": type(t).__name__,
        "shape": tuple(t.shape),
        "strides": tuple(t.stride()) if strided else None,
        "dtype": str(t.dtype),
        "device": str(t.device),
        "layout": str(t.layout),
        "requires_grad": t.requires_grad,
        "is_leaf": t.is_leaf,
        "grad_fn": type(t.grad_fn).__name__ if t.grad_fn is not None else None,
        "conjugate bit": t.is_conj(),
        "negative bit": t.is_neg(),
        "inference tensor": t.is_inference(),
        "has .grad": t.grad is not None if t.is_leaf else None,
        "own attributes": sorted(k for k in vars(t) if not k.startswith("__")),
        "tensor hooks": len(t._backward_hooks or ()) if t.requires_grad else 0,
    }
    if fresh and strided and readable(t):
        result["storage_offset"] = t.storage_offset()
        result["bytes of its storage"] = t.untyped_storage().nbytes()
    return result
