"""The dtypes of the safetensors format and their torch counterparts.

The tables are those of safetensors 0.8. Two of its dtypes, ``F6_E2M3`` and ``F6_E3M2``, have no torch dtype: the
format is valid, but nothing here can hold such a tensor.

``F4`` packs two elements in a byte; torch's ``float4_e2m1fn_x2`` counts the *pairs*. The safetensors binding therefore
halves the last dimension on reading and doubles it on writing, and so does `torch_shape`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)
"""Bits per element of every dtype name of the safetensors format."""

TORCH: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "F4": torch.float4_e2m1fn_x2,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "C64": torch.complex64,
        "F64": torch.float64,
        "I64": torch.int64,
        "U64": torch.uint64,
    }
)
"""The torch dtype of each safetensors dtype name that torch has."""

_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in TORCH.items()})

LARGEST_ELEMENT_BYTES = torch.complex128.itemsize
"""No dtype has larger ones: a block whose size is a multiple of it holds whole elements of any dtype."""


def safetensors_name(dtype: torch.dtype) -> str | None:
    """The safetensors name of ``dtype``; None when the format has none for it (``complex128``, for one)."""
    return _NAMES.get(dtype)


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that torch gives a tensor of the safetensors dtype ``name`` and the header's ``shape``.

    They differ for ``F4`` only. None when torch cannot hold it: an ``F4`` scalar, or an odd last dimension.
    """
    if name != "F4":
        return shape
    if not shape or shape[-1] % 2:
        return None
    return (*shape[:-1], shape[-1] // 2)


def carrier(itemsize: int) -> torch.dtype:
    """A dtype of ``itemsize`` bytes whose copies every torch kernel supports, to move bits that have no kernel of
    their own (fp8, fp4, unsigned)."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[itemsize]
