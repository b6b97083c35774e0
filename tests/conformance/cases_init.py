"""Every function of torch.nn.init, on the shapes and dtypes where it takes another path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .cases import Bag, add, bounded, case, holds, near, weight

init = nn.init


def simple(
    name: str, fn: Callable[[Any], Any], *shape: int, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    def build() -> nn.Module:
        w = weight(*shape, dtype=dtype)
        fn(w)
        return Bag(weight=w)

    add(name, build, __name__, **options)


# Nothing sampled.
simple("constant", lambda w: init.constant_(w, 0.3), kind="exact")
simple("ones", init.ones_, kind="exact")
simple("zeros", init.zeros_, kind="exact")
simple("eye", init.eye_, 48, 64, kind="exact")
simple("dirac_1d", init.dirac_, 16, 16, 3, kind="exact")
simple("dirac_2d_groups", lambda w: init.dirac_(w, 4), 16, 4, 3, 3, kind="exact")
simple("dirac_3d", init.dirac_, 8, 4, 3, 3, 3, kind="exact")

# Sampled in one call.
simple("uniform", lambda w: init.uniform_(w, -0.5, 2.0), check=lambda m: bounded(m.weight, -0.5, 2.0))
simple("normal", lambda w: init.normal_(w, 1.0, 0.02))
simple("xavier_uniform", lambda w: init.xavier_uniform_(w, gain=init.calculate_gain("relu")), 96, 32)
simple("xavier_normal", init.xavier_normal_, 96, 32)
simple("xavier_conv", init.xavier_uniform_, 32, 16, 3, 3)
simple("kaiming_uniform", lambda w: init.kaiming_uniform_(w, a=math.sqrt(5)), 96, 32)
simple("kaiming_fan_out", lambda w: init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"), 32, 16, 3, 3)
simple("kaiming_leaky", lambda w: init.kaiming_uniform_(w, nonlinearity="leaky_relu"), 16, 64)
simple("old_names", lambda w: init.xavier_uniform(w))
simple("generic_normal_bf16", lambda w: init.normal_(w, 0.0, 0.02), dtype=torch.bfloat16)
simple("uniform_half", lambda w: init.uniform_(w, -1, 1), dtype=torch.float16, positional=False)


# trunc_normal_ looks at its own samples.
def trunc(
    name: str, mean: float, std: float, a: float, b: float, *shape: int, dtype: torch.dtype = torch.float32
) -> None:
    slack = 1e-2 * (b - a) if dtype != torch.float32 else 1e-6

    def fn(w: Any) -> None:
        init.trunc_normal_(w, mean=mean, std=std, a=a, b=b)

    simple(
        f"trunc_normal_{name}",
        fn,
        *shape,
        dtype=dtype,
        check=lambda m: bounded(m.weight, a - slack, b + slack),
        positional=dtype == torch.float32,
    )


trunc("never_rejects", 0.0, 0.02, -2.0, 2.0)
trunc("one_std", 0.0, 1.0, -1.0, 1.0)
trunc("two_std", 0.0, 0.02, -0.04, 0.04, 96, 64)
trunc("narrow", 0.0, 1.0, -0.2, 0.2)
trunc("tail", 0.0, 1.0, 2.0, 3.0)
trunc("far_mean", 5.0, 1.0, -2.0, 2.0)
trunc("one_sided", 0.0, 1.0, 0.0, 4.0)
trunc("bf16", 0.0, 1.0, -1.0, 1.0, dtype=torch.bfloat16)
trunc("narrow_half", 0.0, 1.0, -0.3, 0.3, dtype=torch.float16)
trunc("tiny", 0.0, 1.0, -0.5, 0.5, 3)
trunc("conv", 0.0, 0.02, -0.03, 0.03, 32, 3, 8, 8)


@case(check=lambda m: bounded(m.weight, -1.0, 1.0))
def trunc_normal_on_a_view_of_a_parameter() -> nn.Module:
    w = weight()
    init.ones_(w)
    init.trunc_normal_(w[16:], std=1.0, a=-1.0, b=1.0)
    return Bag(weight=w)


@case(check=lambda m: bounded(m.proj.weight, -0.12, 0.12))
def trunc_normal_then_scaled() -> nn.Module:
    m = Bag(proj=nn.Linear(64, 64))
    init.trunc_normal_(m.proj.weight, std=0.02, a=-0.04, b=0.04)
    with torch.no_grad():
        m.proj.weight.mul_(3.0)
    return m


@case(kind="seeded")
def trunc_normal_with_a_generator() -> nn.Module:
    w = weight()
    init.trunc_normal_(w, std=1.0, a=-1.0, b=1.0, generator=torch.Generator().manual_seed(4))
    return Bag(weight=w)


@case(check=lambda m: bounded(m.weight, -0.04, 0.04))
def trunc_normal_as_timm_wrote_it() -> nn.Module:
    """The erfinv formula, which older libraries carry their own copy of."""
    w = weight()
    with torch.no_grad():
        low, high = (1 + math.erf(-2 / math.sqrt(2))) / 2, (1 + math.erf(2 / math.sqrt(2))) / 2
        w.uniform_(2 * low - 1, 2 * high - 1)
        w.erfinv_()
        w.mul_(0.02 * math.sqrt(2.0))
        w.add_(0.0)
        w.clamp_(min=-0.04, max=0.04)
    return Bag(weight=w)


# orthogonal_ and sparse_ compute.
def orthonormal(w: Any, gain: float = 1.0) -> None:
    flat = w.detach().reshape(w.shape[0], -1).double()
    flat = flat if flat.shape[0] <= flat.shape[1] else flat.T
    near(flat @ flat.T, gain**2 * torch.eye(flat.shape[0]), "rows of an orthogonal matrix", 1e-4)


simple("orthogonal_square", init.orthogonal_, check=lambda m: orthonormal(m.weight))
simple("orthogonal_tall", init.orthogonal_, 96, 32, check=lambda m: orthonormal(m.weight))
simple("orthogonal_wide", init.orthogonal_, 32, 96, check=lambda m: orthonormal(m.weight))
simple("orthogonal_gain", lambda w: init.orthogonal_(w, 1.7), check=lambda m: orthonormal(m.weight, 1.7))
simple("orthogonal_conv", init.orthogonal_, 16, 8, 3, 3, check=lambda m: orthonormal(m.weight))


def _zeros_per_column(rate: float) -> Callable[[Any], None]:
    def check(m: Any) -> None:
        zeros = (m.weight == 0).sum(0)
        holds((zeros == math.ceil(rate * m.weight.shape[0])).all(), f"zeros per column: {zeros.unique().tolist()}")

    return check


simple("sparse_few", lambda w: init.sparse_(w, 0.1), check=_zeros_per_column(0.1), positional=False)
simple("sparse_most", lambda w: init.sparse_(w, 0.9, std=2.0), check=_zeros_per_column(0.9), positional=False)


# Combinations.
@case()
def twice_the_last_one_counts() -> nn.Module:
    w = weight()
    init.normal_(w, 5.0, 9.0)
    init.orthogonal_(w)
    init.uniform_(w, 0.0, 0.1)
    return Bag(weight=w)


@case(check=lambda m: [orthonormal(part) for part in m.weight.chunk(4)])
def orthogonal_per_gate() -> nn.Module:
    w = weight(128, 32)
    for part in w.data.chunk(4):
        init.orthogonal_(part)
    return Bag(weight=w)


@case(check=lambda m: orthonormal(m.lin.weight))
def orthogonal_on_data_of_a_layer() -> nn.Module:
    m = Bag(lin=nn.Linear(64, 64))
    init.orthogonal_(m.lin.weight.data)
    m.lin.bias.data.zero_()
    return m


@case()
def kaiming_on_channels_last() -> nn.Module:
    conv = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
    init.kaiming_normal_(conv.weight, mode="fan_out")
    return Bag(conv=conv)


@case(kind="seeded")
def generators_passed_to_init() -> nn.Module:
    g = torch.Generator().manual_seed(8)
    a, b, c = weight(), weight(), weight()
    init.normal_(a, generator=g)
    init.kaiming_uniform_(b, generator=g)
    init.orthogonal_(c, generator=g)
    return Bag(a=a, b=b, c=c)


@case(check=lambda m: holds(not m.frozen.requires_grad, "frozen asks for a gradient"))
def frozen_before_init() -> nn.Module:
    w = nn.Parameter(torch.empty(64, 64), requires_grad=False)
    init.xavier_normal_(w)
    return Bag(frozen=w)


@case()
def returned_value_is_used() -> nn.Module:
    """init functions return the tensor they filled; constructors chain on it."""
    w = nn.Parameter(init.normal_(torch.empty(64, 64), std=0.5) / 2)
    b = nn.Parameter(init.uniform_(torch.empty(512)).mul_(3).sub(1))
    return Bag(w=w, b=b)
