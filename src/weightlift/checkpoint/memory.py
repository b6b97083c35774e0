"""A mapping of tensors as a checkpoint. Nothing is copied: the mapping's tensors are the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from weightlift.checkpoint.entry import TensorEntry
from weightlift.checkpoint.part import WHOLE, Part
from weightlift.checkpoint.torch_state import flat_problem, versions
from weightlift.errors import CheckpointError, Problem
from weightlift.unstrided import MKLDNN, SPARSE, unstrided

SOURCE = "<mapping>"
_SUMMARY = "not a valid mapping of tensors"


def read_mapping(
    whole: Mapping[Any, Any],
    part: Part = WHOLE,
) -> tuple[
    dict[str, TensorEntry], dict[str, torch.Tensor], dict[str, object], Mapping[str, Mapping[str, object]] | None
]:
    """Entries, tensors, other values (uninitialised tensors among them), and ``_metadata`` of a mapping such as
    ``module.state_dict()``, which is ``part`` of ``whole``.

    Raises `CheckpointError` for nested mappings, keys that are no strings, and tensors without plain values: sparse,
    quantised and meta ones, DTensors and other wrappers.
    """
    source = part.find(whole, SOURCE)
    problem = flat_problem(source, SOURCE, lambda value: isinstance(value, torch.Tensor), part) if source else None
    if problem is not None:
        raise CheckpointError(_SUMMARY, [problem])
    problems: list[Problem] = []
    entries: dict[str, TensorEntry] = {}
    tensors: dict[str, torch.Tensor] = {}
    extras: dict[str, object] = {}
    for key, value in source.items():
        if not isinstance(value, torch.Tensor) or is_lazy(value):  # an uninitialised one has neither shape nor value
            extras[key] = value
            continue
        kind = _unreadable(value)
        if kind is not None:
            what, hint = kind
            expected = "a dense tensor with values"
            problems.append(Problem(f"is {what}", key=key, file=SOURCE, expected=expected, hint=hint))
            continue
        tensors[key] = value
        entries[key] = entry_of(key, value)
    if problems:
        raise CheckpointError(_SUMMARY, problems)
    return entries, tensors, extras, versions({"_metadata": getattr(source, "_metadata", None)})


def entry_of(key: str, tensor: torch.Tensor) -> TensorEntry:
    """The entry that describes a tensor in memory."""
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    nbytes = tensor.numel() * tensor.dtype.itemsize
    return TensorEntry(key, tuple(tensor.shape), tensor.dtype, None, 0, nbytes, stride)


def _unreadable(tensor: torch.Tensor) -> tuple[str, str | None] | None:
    """What a tensor without plain values is, and what makes a plain one of it, if anything does."""
    if other := unstrided(tensor):
        hint = "tensor.to_dense() makes a plain one" if other in (SPARSE, MKLDNN) else None
        return f"{'an' if other == MKLDNN else 'a'} {other} tensor", hint
    if tensor.is_quantized:
        return "a quantised tensor", "tensor.dequantize() makes a plain one"
    if tensor.is_meta:
        return "a tensor on meta, without values", None
    if not _has_memory(tensor):
        what = f"a {type(tensor).__name__}, a tensor made of others"
        return what, "tensor.full_tensor() or tensor.dequantize() makes a plain one"
    return None


def _has_memory(tensor: torch.Tensor) -> bool:
    """False for wrapper subclasses, which look like a tensor and hold others instead of values."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return True
    try:
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False
