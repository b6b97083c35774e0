"""Out-of-place work on values that are still to come: recorded with its hazards, lazily, and right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from .cases import Bag, add, bounded, case, equal, holds, near


def value(name: str, fn: Any, **options: Any) -> None:
    """A parameter (or buffers, from a dict) made of what `fn` returns."""

    def build() -> nn.Module:
        made = fn()
        if isinstance(made, dict):
            return Bag(**made)
        return Bag(w=nn.Parameter(made))

    add(name, build, __name__, **options)


N = 64
value("randn_scaled", lambda: torch.randn(N, N) * 0.02)
value("empty_normal_scaled", lambda: torch.empty(N, N).normal_() * 0.3)
value("scalar_first", lambda: 1.0 - 2.0 * torch.rand(N, N))
value("clamped", lambda: torch.randn(N, N).clamp(-1, 1), positional=False)
value("cat_of_parts", lambda: torch.cat([torch.randn(16, N), torch.zeros(16, N), torch.rand(32, N) + 3]))
value("stack_of_parts", lambda: torch.stack([torch.randn(N) * i for i in range(1, 33)]))
value("repeat_expand", lambda: torch.randn(1, N).expand(N, N).clone() + torch.randn(N, 1).repeat(1, N), correlated=True)
value("tril_mask", lambda: torch.tril(torch.randn(N, N)))
value("triu_product", lambda: torch.randn(N, N) * torch.triu(torch.ones(N, N), diagonal=1))
value("where", lambda: torch.where(torch.eye(N).bool(), torch.zeros(()), torch.randn(N, N)))
value("where_on_sampled", lambda: (lambda a: torch.where(a > 0, a, -a))(torch.randn(N, N)))
value("cumsum", lambda: torch.randn(N, N).cumsum(0), correlated=True)
value("einsum", lambda: torch.einsum("ij,kj->ik", torch.randn(N, 8), torch.randn(N, 8)), correlated=True)
value("matmul_chain", lambda: torch.randn(N, 8) @ torch.randn(8, N) / math.sqrt(8), correlated=True)
value("softmax_normalize", lambda: F.normalize(torch.softmax(torch.randn(N, N), -1), dim=-1), correlated=True)
value("fft", lambda: torch.fft.irfft(torch.fft.rfft(torch.randn(N, N))[:, :20], n=N), correlated=True)
value("complex_parameter", lambda: torch.randn(N, N, dtype=torch.cfloat) * 0.1)
value("complex_from_parts", lambda: torch.complex(torch.randn(N, N), torch.zeros(N, N)))
value("complex_conjugate_resolved", lambda: torch.randn(N, N, dtype=torch.cfloat).conj().resolve_conj())
value("polar", lambda: torch.polar(torch.ones(N), torch.arange(N) * 0.1), kind="exact")
value("view_as_real", lambda: torch.view_as_real(torch.randn(N, N, dtype=torch.cfloat)))
value("like_factories", lambda: torch.rand_like(torch.empty(N, N)) + torch.zeros_like(torch.ones(N, N)))
value("new_factories", lambda: torch.empty(2).new_empty(N, N).normal_() + torch.ones(1).new_full((N, N), 2.0))
value("normal_with_tensors", lambda: torch.normal(torch.arange(4096.0), torch.ones(4096)))
value("bernoulli_mask", lambda: torch.bernoulli(torch.full((N, N), 0.25)), positional=False)
value("dropout_of_ones", lambda: F.dropout(torch.ones(N, N), 0.5), positional=False)
value("randint", lambda: {"b": torch.randint(0, 1000, (N, N))}, positional=False)
value("randperm", lambda: {"b": torch.randperm(4096)}, positional=False)
value("multinomial", lambda: {"b": torch.multinomial(torch.ones(512), 400)}, positional=False)
value("distribution", lambda: torch.distributions.Normal(1.0, 0.1).sample((N, N)))
value("gamma_dirichlet", lambda: torch.distributions.Dirichlet(torch.ones(N)).sample((N,)))
value("argsort_of_sampled", lambda: {"b": torch.rand(1024).argsort()}, positional=False)
value("sorted", lambda: torch.sort(torch.rand(N, N), dim=1).values)
value("topk", lambda: torch.topk(torch.rand(N, N), 8).values)
value("one_hot", lambda: {"b": F.one_hot(torch.arange(N) % 8, 8)}, kind="exact")
value("cast_down", lambda: (torch.randn(N, N) * 0.02).to(torch.bfloat16))
value("cast_to_int", lambda: {"b": (torch.rand(N, N) * 1000).to(torch.int32)}, positional=False)
value("linspace_table", lambda: torch.linspace(0, 1, 4096).view(N, N) ** 2, kind="exact")
value("logspace_flip_roll", lambda: torch.logspace(0, 1, 50).flip(0).roll(3), kind="exact")
value(
    "meshgrid",
    lambda: torch.stack(torch.meshgrid(torch.arange(8), torch.arange(9), indexing="ij")).float(),
    kind="exact",
)
value(
    "pad_interpolate",
    lambda: F.interpolate(F.pad(torch.randn(1, 4, 16, 16), (1, 1, 2, 2)), scale_factor=2.0),
    correlated=True,
)
value("conv_of_sampled", lambda: F.conv2d(torch.randn(1, 3, 32, 32), torch.randn(4, 3, 3, 3)), correlated=True)
value("unfold_fold", lambda: F.unfold(torch.randn(1, 4, 16, 16), 2, stride=2), correlated=True)
value(
    "kron_outer",
    lambda: torch.kron(torch.eye(8), torch.randn(8, 8)) + torch.outer(torch.ones(64), torch.randn(64)),
    correlated=True,
)
value("gather_take", lambda: torch.randn(N, N).gather(1, torch.arange(N).flip(0).expand(N, N)))
value("index_select", lambda: torch.randn(N, N)[torch.tensor([3, 1, 2])].repeat_interleave(4, 0), correlated=True)
value("std_mean_normalised", lambda: (lambda a: (a - a.mean()) / a.std())(torch.rand(N, N)))
value("chained_far", lambda: (lambda a: sum((a * 0.1 for _ in range(50)), a))(torch.randn(N, N)))
value("permuted_contiguous", lambda: torch.randn(N, 32, 4).permute(2, 0, 1).contiguous())
value("strided_result", lambda: torch.randn(N, 32).t() * 2)
value("window", lambda: {"b": torch.hann_window(400)}, kind="exact")
value("block_diag", lambda: torch.block_diag(torch.randn(20, 20), torch.ones(3, 3)))
value("vmap", lambda: torch.vmap(lambda row: row * 2 + 1)(torch.randn(N, N)))
value(
    "lowrank_svd_truncated",
    lambda: (lambda u, s, v: (u[:, :8] * s[:8]) @ v[:8])(*torch.linalg.svd(torch.randn(N, N))),
    correlated=True,
)
value("qr", lambda: torch.linalg.qr(torch.randn(N, N)).Q)
value("inverse", lambda: torch.linalg.inv(torch.randn(32, 32) * 0.01 + torch.eye(32)))
value("matrix_exp_of_skew", lambda: (lambda a: torch.matrix_exp(a - a.T))(torch.randn(32, 32) * 0.1))
value(
    "cholesky", lambda: (lambda a: torch.linalg.cholesky(a @ a.T + torch.eye(32)))(torch.randn(32, 64)), correlated=True
)


@case(check=lambda m: equal(m.b, m.a * 2 + 1, "b is 2a + 1"))
def shared_sample_feeds_two_parameters() -> nn.Module:
    t = torch.randn(64, 64)
    return Bag(a=nn.Parameter(t.clone()), b=nn.Parameter(t * 2 + 1))


@case(check=lambda m: equal(m.b, m.a / 4, "b is a / 4"))
def one_parameter_computed_from_another() -> nn.Module:
    a = nn.Parameter(torch.randn(64, 64))
    return Bag(a=a, b=nn.Parameter(a.detach() / 4))


@case(check=lambda m: (holds(m.b.std() > 0.5, "b was zeroed with a"), holds((m.a == 0).all(), "a is not zero")))
def write_after_read() -> nn.Module:
    a = torch.randn(64, 64)
    b = a.clone()
    a.zero_()
    return Bag(a=nn.Parameter(a), b=nn.Parameter(b))


def _scratch(m: Any) -> None:
    for i in range(4):
        near(m.get_parameter(f"p{i}").mean(), 10.0 * i, f"the scratch buffer's {i}th contents", 0.2)


@case(check=_scratch)
def one_scratch_buffer_used_four_times() -> nn.Module:
    scratch = torch.empty(64, 64)
    bag = Bag()
    for i in range(4):
        scratch.normal_(10.0 * i, 0.5)
        bag.register_parameter(f"p{i}", nn.Parameter(scratch.clone()))
    return bag


@case(check=lambda m: (equal(m.a, m.c, "c is a's first value"), equal(m.b, m.c.abs() + 1, "b is |c| + 1")))
def overwritten_between_two_reads() -> nn.Module:
    t = torch.randn(64, 64)
    a = nn.Parameter(torch.empty(64, 64))
    with torch.no_grad():
        a.copy_(t)
        c = t.clone()
        t.abs_()
        t += 1
    return Bag(a=a, b=nn.Parameter(t), c=nn.Parameter(c))


@case(check=lambda m: equal(m.b, m.a, "b is a before the swap"))
def swapped_through_a_temporary() -> nn.Module:
    x, y = torch.randn(64, 64), torch.rand(64, 64) + 5
    keep = x.clone()
    x.copy_(y)
    y.copy_(keep)
    return Bag(a=nn.Parameter(keep), b=nn.Parameter(y), c=nn.Parameter(x))


@case(check=lambda m: (equal(m.a, m.b, "both copies"), bounded(m.a, 5, 6)))
def copied_before_the_source_is_sampled_again() -> nn.Module:
    a, b, source = (nn.Parameter(torch.empty(64, 64)) for _ in range(3))
    with torch.no_grad():
        source.uniform_(5, 6)
        a.copy_(source)
        b.copy_(a)
        source.uniform_(-6, -5)
    return Bag(a=a, b=b, source=source)


@case(check=lambda m: near(m.norms, m.w.norm(dim=1), "norms of w"))
def statistics_of_a_weight_as_a_buffer() -> nn.Module:
    w = nn.Parameter(torch.randn(64, 64))
    return Bag(w=w, norms=w.detach().norm(dim=1))


@case()
def a_view_of_a_result_outlives_it() -> nn.Module:
    big = torch.randn(4, 4096) * 3
    return Bag(w=nn.Parameter(big[1].clone()), v=nn.Parameter(torch.randn(64, 64).mul(2)[::2].contiguous()))


@case(kind="exact")
def alibi_slopes_and_relative_positions() -> nn.Module:
    slopes = torch.tensor([2 ** (-8 * (i + 1) / 8) for i in range(8)])
    distance = torch.arange(32)[None, :] - torch.arange(32)[:, None]
    bias = slopes[:, None, None] * distance.abs().neg().float()
    coords = torch.stack(torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")).flatten(1)
    index = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
    index[:, :, 0] += 6
    index[:, :, 0] *= 13
    return Bag(slopes=slopes, bias=bias, index=index.sum(-1))


@case()
def multi_output_operations() -> nn.Module:
    values, indices = torch.randn(64, 64).max(dim=1)
    std, mean = torch.std_mean(torch.rand(64, 64), dim=1)
    low, high = torch.rand(64, 64).aminmax(dim=0)
    return Bag(values=values, std=std, mean=mean, low=nn.Parameter(low), high=high, kept=indices.clamp(max=63) >= 0)


@case(check=lambda m: near(m.w.pow(2).mean(), 1.0, "power-of-two gain", 0.2))
def gain_from_the_sample_itself() -> nn.Module:
    w = torch.randn(64, 64) * 3
    return Bag(w=nn.Parameter(w / w.pow(2).mean().sqrt()))
