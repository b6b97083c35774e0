"""Dtypes, memory formats, layouts and casts inside constructors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .cases import Bag, add, case, equal, holds


def cast(name: str, fn: Any, inputs: Any = None, **options: Any) -> None:
    def build() -> nn.Module:
        m = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
        m.register_buffer("steps", torch.arange(4))
        return fn(m)

    add(f"cast_{name}", build, __name__, inputs=inputs, **options)


cast("half", lambda m: m.half(), positional=False)
cast("bfloat16", lambda m: m.bfloat16(), lambda: (torch.rand(2, 64, dtype=torch.bfloat16),), positional=False)
cast("double", lambda m: m.double(), lambda: (torch.rand(2, 64, dtype=torch.double),))
cast("to_dtype", lambda m: m.to(torch.float64))
cast("to_and_back", lambda m: m.to(torch.bfloat16).float(), positional=False)
cast("to_device_cpu", lambda m: m.to("cpu").cpu())
cast("requires_grad_false", lambda m: m.requires_grad_(False), lambda: (torch.rand(2, 64),))
cast("eval", lambda m: m.eval(), lambda: (torch.rand(2, 64),))
cast("share_memory", lambda m: m.share_memory())
cast("type", lambda m: m.type(torch.float64))
cast("partly_frozen", lambda m: (m[0].requires_grad_(False).eval(), m[2].bias.requires_grad_(False), m)[-1])
cast("one_layer_in_fp32", lambda m: (m.bfloat16(), m[1].float(), m)[-1], positional=False)


def made(name: str, fn: Any, **options: Any) -> None:
    add(f"made_{name}", lambda: Bag(**fn()), __name__, **options)


for kind in (torch.float16, torch.bfloat16, torch.float64):
    made(
        str(kind).split(".")[-1],
        lambda kind=kind: {
            "w": nn.Parameter(torch.randn(64, 64, dtype=kind)),
            "e": nn.Parameter(torch.empty(64, 64, dtype=kind).uniform_(1, 2)),
            "z": torch.zeros(3, dtype=kind),
        },
        positional=False,
    )
for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
    made(
        str(kind).split(".")[-1],
        lambda kind=kind: {
            "w": nn.Parameter(torch.randn(64, 64).to(kind), requires_grad=False),
            "e": nn.Parameter(torch.zeros(8, 8).to(kind), requires_grad=False),
            "s": torch.ones(8),
        },
        positional=False,
    )
for kind in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool):
    made(
        str(kind).split(".")[-1],
        lambda kind=kind: {
            "a": torch.ones(64, dtype=kind),
            "b": torch.zeros(4, 4).to(kind),
            "c": torch.eye(5, dtype=kind),
        },
        kind="exact",
    )
made(
    "uint16_uint32",
    lambda: {"a": torch.full((8,), 7, dtype=torch.uint16), "b": torch.tensor([1, 2], dtype=torch.uint32)},
    kind="exact",
)
made(
    "complex",
    lambda: {
        "w": nn.Parameter(torch.randn(64, 64, dtype=torch.complex64)),
        "z": torch.zeros(4, dtype=torch.complex128),
    },
)
made("float8_scale", lambda: {"s": torch.ones(8).to(torch.float8_e8m0fnu)}, kind="exact", loadable=False)


@case(inputs=lambda: (torch.rand(1, 16, 8, 8),))
def channels_last_module() -> nn.Module:
    m = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 16, 3))
    return m.to(memory_format=torch.channels_last)


@case(inputs=lambda: (torch.rand(1, 8, 4, 4, 4),))
def channels_last_3d() -> nn.Module:
    return nn.Conv3d(8, 16, 3).to(memory_format=torch.channels_last_3d)


@case()
def strides_kept() -> nn.Module:
    column = nn.Parameter(torch.empty_strided((64, 32), (1, 64)))
    nn.init.normal_(column)
    gaps = nn.Parameter(torch.empty_strided((8, 8), (16, 1)))
    with torch.no_grad():
        gaps.uniform_()
    last = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    return Bag(
        column=column, gaps=gaps, last=last, like=nn.Parameter(torch.ones_like(last) * 2), t=torch.rand(64, 8).t()
    )


@case()
def format_kept_by_arguments() -> nn.Module:
    a = torch.empty(2, 4, 8, 8, memory_format=torch.channels_last).normal_()
    b = torch.empty_like(a).fill_(1.0)
    c = torch.rand_like(a, dtype=torch.double)
    d = a.clone(memory_format=torch.contiguous_format)
    e = a.to(torch.bfloat16).float()
    return Bag(a=a, b=b, c=nn.Parameter(c), d=d, e=e)


@case(kind="exact")
def expanded_buffer() -> nn.Module:
    """Strides of zero: many elements, one value in memory."""
    bag = Bag(w=nn.Parameter(torch.ones(2)))
    bag.register_buffer("position_ids", torch.arange(64).expand((1, -1)), persistent=False)
    bag.register_buffer("mask", torch.zeros(1).expand(8, 8), persistent=False)
    return bag


@case(kind="exact")
def default_dtype_set_and_restored() -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        w = nn.Parameter(torch.ones(4, 4))
        lin = nn.Linear(4, 4)
        nn.init.zeros_(lin.weight)
        nn.init.zeros_(lin.bias)
        listed = torch.tensor([1.0, 2.0])
        old = torch.Tensor(2, 2).zero_()
    finally:
        torch.set_default_dtype(before)
    return Bag(w=w, lin=lin, listed=listed, old=old, after=torch.zeros(2), table=torch.arange(0, 1, 0.5))


@case()
def default_dtype_half_around_a_layer() -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        lin = nn.Linear(64, 64)
    finally:
        torch.set_default_dtype(before)
    return Bag(lin=lin, other=nn.Linear(64, 64))


@case(kind="exact", loadable=False)
def sparse_tensors() -> nn.Module:
    indices = torch.tensor([[0, 1, 2], [2, 0, 1]])
    bag = Bag(w=nn.Parameter(torch.ones(4)))
    bag.register_buffer("coo", torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, 3.0]), (3, 3)).coalesce())
    bag.register_buffer("csr", torch.eye(5).to_sparse_csr())
    bag.register_buffer("dense", torch.sparse.mm(bag.coo, torch.eye(3)))
    return bag


@case(loadable=False, positional=False)
def sparse_made_of_samples() -> nn.Module:
    w = torch.randn(64, 64)
    w[w.abs() < 1.0] = 0.0
    sparse = w.to_sparse()
    bag = Bag(w=nn.Parameter(torch.randn(64, 64)))
    bag.count = [min(sparse._nnz(), 1)]
    bag.register_buffer("dense", sparse.to_dense() != 0)
    equal(sparse.to_dense(), w, "sparse and dense")
    return bag


@case(kind="exact", loadable=False)
def quantized_tensor() -> nn.Module:
    bag = Bag(w=nn.Parameter(torch.ones(4)))
    bag.register_buffer("q", torch.quantize_per_tensor(torch.arange(16.0), 0.5, 3, torch.quint8))
    bag.register_buffer("back", bag.q.dequantize())
    return bag


@case(positional=False)
def packed_int4_weights() -> nn.Module:
    """As GPTQ and AWQ pack: scales from the sample, nibbles shifted together."""
    w = torch.randn(64, 64)
    scale = w.abs().amax(1, keepdim=True) / 7
    q = (w / scale).round().clamp(-8, 7).to(torch.int32) + 8
    packed = torch.zeros(64, 8, dtype=torch.int32)
    for i in range(8):
        packed |= q[:, i::8] << (4 * i)
    return Bag(packed=packed, scale=scale, zeros=torch.full((8,), 8, dtype=torch.uint8))


def _int8(m: Any) -> None:
    holds(m.q.abs().max() == 127, "the largest quantised value is not 127")


@case(positional=False, check=_int8)
def int8_parameters_without_gradient() -> nn.Module:
    w = torch.randn(64, 64)
    q = torch.round(w / w.abs().max() * 127).to(torch.int8)
    return Bag(q=nn.Parameter(q, requires_grad=False), s=nn.Parameter(w.abs().max() / 127))


@case(kind="exact")
def type_promotion() -> nn.Module:
    a = torch.arange(4) / 2
    b = torch.ones(4, dtype=torch.float16) * torch.tensor(2.0)
    c = torch.arange(4, dtype=torch.int32) + torch.arange(4)
    d = torch.ones(4, dtype=torch.bfloat16) + torch.ones(4)
    return Bag(a=a, b=b, c=c, d=d, e=torch.zeros(2).to(a), f=torch.ones(2).type_as(b), g=torch.tensor(1) * 1.5)
