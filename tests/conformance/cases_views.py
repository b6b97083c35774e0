"""In-place chains, and in-place writes through every kind of view."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .cases import Bag, add, bounded, case, holds, weight


def chain(name: str, fn: Any, *shape: int, **options: Any) -> None:
    """A parameter, first sampled, that `fn` changes in place under no_grad."""

    def build() -> nn.Module:
        w = weight(*shape)
        nn.init.normal_(w)
        with torch.no_grad():
            fn(w)
        return Bag(w=w)

    add(name, build, __name__, **options)


chain("mul_add_clamp", lambda w: w.normal_().mul_(0.5).add_(0.1).clamp_(-1, 1), positional=False)
chain("erfinv", lambda w: w.uniform_(-0.9, 0.9).erfinv_().mul_(0.02))
chain("exp_log_pow_abs", lambda w: w.abs_().add_(0.1).log_().exp_().pow_(2).sqrt_().neg_())
chain("operators", lambda w: exec("w *= 2; w += 1; w /= 3; w -= 0.1; w **= 2", {"w": w}))
chain("row_fill", lambda w: w[0].fill_(7.0))
chain("row_assign", lambda w: w.__setitem__(0, 7.0))
chain("padding_row_zero", lambda w: w[5].zero_())
chain("every_other_column", lambda w: w[:, ::2].uniform_(5, 6))
chain("transpose", lambda w: w.T[3].fill_(2.0))
chain("diagonal", lambda w: w.diagonal().fill_(1.0))
chain("fill_diagonal", lambda w: w.fill_diagonal_(3.0), 32, 48)
chain("flatten_view", lambda w: w.view(-1)[100:200].zero_())
chain("reshape_unflatten", lambda w: w.reshape(4, 16, 64).select(1, 3).mul_(0))
chain("permute_unsqueeze", lambda w: w.permute(1, 0).unsqueeze(0)[:, :8].fill_(-1))
chain("narrow_copy", lambda w: w.narrow(0, 8, 8).copy_(torch.ones(64)))
chain("negative_slices", lambda w: w[-3:, -5:].fill_(0.5))
chain("index_list_zero", lambda w: w.__setitem__([1, 3, 5], 0.0))
chain("index_tensor_zero", lambda w: w.__setitem__(torch.tensor([1, 3, 5]), 0.0))
chain("index_put", lambda w: w.index_put_((torch.tensor([0, 1]), torch.tensor([2, 3])), torch.tensor([8.0, 9.0])))
chain("index_fill", lambda w: w.index_fill_(0, torch.tensor([2]), 1.0))
chain("index_add_of_own_row", lambda w: w.index_add_(0, torch.tensor([2]), w[3:4].clone()))
chain("masked_fill", lambda w: w.masked_fill_(torch.eye(64, dtype=torch.bool), 0.0))
chain("boolean_index", lambda w: w.__setitem__(torch.eye(64) > 0, 4.0))
chain("scatter", lambda w: w.scatter_(1, torch.zeros(64, 1, dtype=torch.long), 6.0))
chain("tril_in_place", lambda w: w.tril_())
chain("triu_then_add_eye", lambda w: w.triu_(1).add_(torch.eye(64)))
chain("mask_of_own_values", lambda w: w.__setitem__(w < 0, 0.0), positional=False)
chain("clamp_by_own_bounds", lambda w: w.clamp_(min=w.mean(), max=w.max()), positional=False)
chain("divide_by_own_norm", lambda w: w.div_(w.norm(dim=1, keepdim=True)))
chain("add_own_transpose", lambda w: w.add_(w.t().clone()), check=lambda m: holds(torch.equal(m.w, m.w.T), "w != w.T"))
chain("renorm", lambda w: w.renorm_(2, 0, 0.5))
chain("lerp_addcmul", lambda w: w.lerp_(torch.ones(64, 64), 0.5).addcmul_(torch.ones(64, 64), w, value=0.1))
chain("copy_from_row", lambda w: w[1].copy_(w[0]), check=lambda m: holds(torch.equal(m.w[0], m.w[1]), "rows differ"))
chain("swap_rows", lambda w: w.__setitem__([0, 1], w[[1, 0]]))
chain("expand_source", lambda w: w.copy_(torch.arange(64.0).expand(64, 64)), kind="exact")
chain("as_strided", lambda w: w.as_strided((8, 8), (64, 1), 5).fill_(3.0))
chain("unfold_view", lambda w: w.unfold(1, 8, 8)[:, 0].fill_(2.5))
chain("view_as_complex", lambda w: torch.view_as_complex(w.data.view(64, 32, 2)).imag.fill_(0.25))
chain("view_dtype", lambda w: w.data.view(torch.int32)[0].fill_(1065353216))
chain("out_argument", lambda w: torch.mul(torch.ones(64, 64), 0.7, out=w.data[:]), kind="exact")
chain("foreach", lambda w: torch._foreach_zero_([w]), kind="exact")
chain("detach", lambda w: w.detach()[2:4].fill_(1.5))
chain("set_to_zero_by_mul", lambda w: w.mul_(0.0).abs_(), kind="exact")
chain("bernoulli", lambda w: w.bernoulli_(0.3), positional=False)
chain("cauchy_exponential", lambda w: w.exponential_(2.0).neg_().exp_())
chain("random_integers", lambda w: w.random_(0, 100), positional=False)
chain("log_normal_geometric", lambda w: (w[:32].log_normal_(0, 0.5), w[32:].geometric_(0.4)), positional=False)
chain("dropout_in_place", lambda w: nn.functional.dropout(w, 0.5, True, True), positional=False)
chain("relu_in_place", lambda w: torch.relu_(w).add_(1), positional=False)


@case()
def chunk_split_unbind() -> nn.Module:
    a, b, c = weight(96, 32), weight(96, 32), weight(6, 512)
    with torch.no_grad():
        for scale, part in enumerate(a.chunk(3)):
            part.normal_(std=10.0**scale)
        for scale, part in enumerate(b.data.split([32, 16, 48])):
            nn.init.uniform_(part, scale, scale + 0.5)
        for scale, row in enumerate(c.unbind(0)):
            row.fill_(scale)
    return Bag(a=a, b=b, c=c)


@case()
def interleaved_writes_to_overlapping_views() -> nn.Module:
    """The order of the writes decides which one is seen."""
    w = weight()
    with torch.no_grad():
        top, left = w[:32], w[:, :32]
        w.fill_(1.0)
        top.normal_()
        left.fill_(2.0)
        top[0].fill_(3.0)
        left.T[1:3].uniform_(8, 9)
    return Bag(w=w)


@case()
def lstm_style_forget_gate() -> nn.Module:
    lstm = nn.LSTM(16, 32, 2)
    for name, p in lstm.named_parameters():
        if "bias" in name:
            n = p.size(0)
            p.data.fill_(0)
            p.data[n // 4 : n // 2].fill_(1)
        else:
            nn.init.xavier_uniform_(p)
    return Bag(lstm=lstm)


@case()
def view_taken_before_the_parameter_is_made() -> nn.Module:
    base = torch.empty(4, 1024)
    rows = [base[i] for i in range(4)]
    w = nn.Parameter(base)
    for i, row in enumerate(rows):
        row.normal_(mean=10.0 * i)
    return Bag(w=w)


@case()
def view_kept_after_its_base_has_died() -> nn.Module:
    return Bag(w=nn.Parameter(torch.empty(4, 1024).normal_()[2]), v=nn.Parameter(torch.randn(64, 64).T))


@case(check=lambda m: bounded(m.w, -0.5, 0.5))
def written_through_dot_data_of_a_view() -> nn.Module:
    lin = nn.Linear(64, 64)
    lin.weight.data.view(8, 8, 64).data[3].data.uniform_(-0.5, 0.5)
    lin.weight.data[:].clamp_(-0.5, 0.5)
    return Bag(w=lin.weight)


@case(kind="exact")
def numbers_written_one_by_one() -> nn.Module:
    table = torch.zeros(16, 32)
    for pos in range(16):
        for i in range(0, 32, 2):
            table[pos, i] = pos + i / 32
            table[pos, i + 1] = pos - i / 32
    return Bag(table=table.unsqueeze(0))


@case(kind="exact")
def sinusoid_written_to_slices() -> nn.Module:
    table = torch.zeros(64, 32)
    position = torch.arange(64).unsqueeze(1).float()
    rate = torch.exp(torch.arange(0, 32, 2).float() * -0.3)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    p = nn.Parameter(torch.empty(64, 32), requires_grad=False)
    p.detach_()
    p[:, :16] = torch.sin(position * rate)
    p[:, 16:] = torch.cos(position * rate)
    return Bag(table=table, p=p)
