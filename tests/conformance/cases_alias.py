"""Ties, views, tensors held elsewhere, storages that change: who shares what with whom."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .cases import Bag, case, equal, holds, near


@case(inputs=None)
def tied_embedding_and_head() -> nn.Module:
    emb, head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    head.weight = emb.weight
    return Bag(emb=emb, head=head)


@case()
def one_parameter_under_three_names() -> nn.Module:
    w = nn.Parameter(torch.empty(64, 64))
    nn.init.normal_(w)
    return Bag(a=Bag(w=w), b=Bag(w=w), w=w)


@case()
def tied_before_then_initialised_through_both() -> nn.Module:
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    b.weight = a.weight
    nn.init.normal_(a.weight, std=5)
    with torch.no_grad():
        b.weight.add_(100.0)
    return Bag(a=a, b=b)


@case()
def one_module_under_two_names() -> nn.Module:
    block = nn.Linear(64, 64)
    return Bag(layers=nn.ModuleList([block, nn.ReLU(), block]), alias=block)


@case(check=lambda m: holds(m.view.data_ptr() == m.emb.weight.data_ptr(), "not the same memory"))
def parameter_made_of_a_parameter() -> nn.Module:
    emb = nn.Embedding(64, 32)
    return Bag(emb=emb, view=nn.Parameter(emb.weight))


@case()
def parameter_made_of_data() -> nn.Module:
    emb = nn.Embedding(64, 32)
    return Bag(emb=emb, head=nn.Parameter(emb.weight.data), frozen=nn.Parameter(emb.weight.data[:16], False))


@case(loadable=True)
def buffers_that_are_views_of_a_weight() -> nn.Module:
    lin = nn.Linear(64, 64)
    bag = Bag(lin=lin)
    bag.register_buffer("top", lin.weight.data[:8])
    bag.register_buffer("diagonal", lin.weight.detach().diagonal(), persistent=False)
    bag.plain = lin.weight.data.T
    return bag


@case()
def fused_projection_with_views_as_parameters() -> nn.Module:
    fused = torch.empty(96, 32).normal_()
    q, k, v = (nn.Parameter(part) for part in fused.chunk(3))
    return Bag(q=q, k=k, v=v)


@case()
def one_flat_buffer_behind_all_parameters() -> nn.Module:
    m = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 64))
    flat = nn.utils.parameters_to_vector(m.parameters()).detach()
    nn.utils.vector_to_parameters(flat, m.parameters())
    m.flat = flat
    return m


@case()
def retied_after_initialisation() -> nn.Module:
    emb, head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    head.weight = emb.weight
    head.weight = nn.Parameter(torch.empty(64, 32))
    nn.init.ones_(head.weight)
    head.weight = emb.weight
    nn.init.uniform_(emb.weight, 1, 2)
    return Bag(emb=emb, head=head)


@case()
def untied_by_a_clone() -> nn.Module:
    emb, head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    head.weight = nn.Parameter(emb.weight.clone())
    return Bag(emb=emb, head=head)


@case(check=lambda m: (near(m.a.weight.mean(), 7.0, "a", 0.5), holds((m.b.weight == 2).all(), "b")))
def data_reassigned() -> nn.Module:
    """`.data =` re-points the Parameter: a tape that holds the Parameter would replay over the new memory."""
    a, b, c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
    old = a.weight.data
    a.weight.data = torch.randn(64, 64) + 7
    b.weight.data = torch.full((64, 64), 2.0)
    c.weight.data = c.weight.data.clone().t().contiguous()
    bag = Bag(a=a, b=b, c=c)
    bag.old = old
    return bag


@case(check=lambda m: holds((m.lin.weight[:, 0] == 0).all() and m.lin.weight.shape == (64, 32), "shape"))
def data_reassigned_with_another_shape() -> nn.Module:
    lin = nn.Linear(64, 64)
    lin.weight.data = lin.weight.data[:, :32]
    lin.weight.data[:, 0].zero_()
    lin.weight.data = lin.weight.data.contiguous()
    return Bag(lin=lin)


@case()
def two_parameters_point_to_one_data() -> nn.Module:
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    b.weight.data = a.weight.data
    a.bias.data = b.bias.data = torch.rand(64)
    return Bag(a=a, b=b)


@case()
def set_and_swap() -> nn.Module:
    a, b, c = (nn.Parameter(torch.randn(64, 64)) for _ in range(3))
    with torch.no_grad():
        b.set_(torch.rand(64, 64) + 5)
        c.set_(a.untyped_storage(), 0, (32, 64), (64, 1))
    d, e = nn.Parameter(torch.rand(8, 8) + 9), nn.Parameter(torch.zeros(8, 8))
    torch.utils.swap_tensors(d, e)
    return Bag(a=a, b=b, c=c, d=d, e=e)


@case()
def resized() -> nn.Module:
    a = torch.empty(0).resize_(64, 64).normal_()
    b = torch.ones(8)
    b.resize_(64)[8:] = 2.0
    c = torch.randn(64, 64)
    c.resize_(32, 64)
    d = torch.empty(0)
    d.resize_as_(a).fill_(4.0)
    e = torch.empty(0)
    torch.mul(torch.full((16,), 2.0), 3, out=e)
    return Bag(a=nn.Parameter(a), b=b, c=nn.Parameter(c), d=d, e=e)


@functools.cache
def _table(n: int) -> torch.Tensor:
    return torch.arange(float(n)).sin()


@functools.cache
def _noise(n: int) -> torch.Tensor:
    return torch.empty(n, n).normal_()


@case(reset=_table.cache_clear, extra=lambda: {"table": _table(64)}, kind="exact")
def table_in_an_lru_cache() -> nn.Module:
    return Bag(a=nn.Parameter(_table(64) * 2), b=_table(64))


@case(reset=_noise.cache_clear, extra=lambda: {"noise": _noise(64)}, missing=False)
def sample_in_an_lru_cache() -> nn.Module:
    return Bag(a=nn.Parameter(_noise(64).clone()), b=nn.Parameter(torch.rand(64, 64)))


CACHE: dict[str, Any] = {}


@case(reset=CACHE.clear, extra=lambda: CACHE)
def tensors_in_a_global_dict() -> nn.Module:
    CACHE["t"] = torch.empty(64, 64).uniform_(2, 3)
    CACHE["list"] = [torch.full((4,), 1.5), torch.rand(64, 64)]
    return Bag(w=nn.Parameter(torch.randn(64, 64)))


class Holder:
    def __init__(self) -> None:
        self.deep = {"a": [torch.empty(64, 64).normal_(), (torch.zeros(3), None)]}


@case()
def tensors_in_plain_attributes() -> nn.Module:
    bag = Bag(lin=nn.Linear(64, 64))
    bag.plain = torch.randn(64, 64)
    bag.listed = [torch.empty(64, 64).uniform_(1, 2), torch.ones(2)]
    bag.mapped = {"k": (torch.arange(5), torch.eye(3))}
    bag.holder = Holder()
    bag.unregistered = [nn.Linear(64, 64)]
    bag.grads = list(bag.parameters())
    return bag


@case()
def plain_attributes_that_alias_parameters() -> nn.Module:
    """These must see what is loaded."""
    lin = nn.Linear(64, 64)
    bag = Bag(lin=lin)
    bag.seen = lin.weight.data
    bag.row = [lin.weight.detach()[5], lin.bias.data]
    bag.turned = lin.weight.data.t()
    bag.same = [lin.weight]
    return bag


@case(check=lambda m: equal(m.base[1], m.w, "w is a row of base"))
def parameter_that_is_a_row_of_a_kept_tensor() -> nn.Module:
    base = torch.randn(4, 1024)
    bag = Bag(w=nn.Parameter(base[1]))
    bag.base = base
    return bag


@case()
def closure_keeps_a_tensor() -> nn.Module:
    hidden = torch.empty(64, 64).normal_()
    bag = Bag(w=nn.Parameter(torch.rand(64, 64)))
    bag.hidden = _Closure(hidden)
    return bag


class _Closure:
    def __init__(self, t: torch.Tensor) -> None:
        self.call = lambda: t
        self.t = t


@case()
def zero_size_and_scalars() -> nn.Module:
    return Bag(
        none=nn.Parameter(torch.empty(0)),
        rows=nn.Parameter(torch.randn(0, 64)),
        scale=nn.Parameter(torch.tensor(0.5)),
        sampled=nn.Parameter(torch.randn(())),
        ones=nn.Parameter(torch.ones([]) * 2.6592),
        w=nn.Parameter(torch.rand(64, 64)),
        step=torch.tensor(0),
        empty=torch.zeros(3, 0, 2, dtype=torch.int64),
    )


@case(kind="exact")
def non_persistent_and_none_buffers() -> nn.Module:
    bag = Bag(w=nn.Parameter(torch.ones(4)))
    bag.register_buffer("kept", torch.arange(8))
    bag.register_buffer("gone", torch.arange(8) * 2, persistent=False)
    bag.register_buffer("nothing", None)
    bag.register_parameter("absent", None)
    bag.register_buffer("mask", torch.tril(torch.ones(8, 8, dtype=torch.bool)).view(1, 1, 8, 8))
    bag.register_buffer("minus", torch.tensor(-1e4), persistent=False)
    return bag


@case()
def attributes_and_hooks_on_parameters() -> nn.Module:
    w = nn.Parameter(torch.randn(64, 64))
    w.no_decay, w.note = True, {"lr": 0.1}
    w.register_hook(lambda g: g * 2)
    bag = Bag(w=w, lin=nn.Linear(64, 64))
    bag.lin.weight.tensor_model_parallel = True
    bag.register_forward_pre_hook(lambda m, a: None)
    return bag


@case()
def parameter_replaced_deleted_and_renamed() -> nn.Module:
    lin = nn.Linear(64, 64)
    w = lin.weight
    del lin.weight
    lin.register_parameter("renamed", w)
    lin.bias = None
    lin.register_parameter("bias", nn.Parameter(torch.zeros(64)))
    return Bag(lin=lin, shrunk=nn.Parameter(w.data[:8].clone()))


class Tagged(torch.Tensor):
    pass


@case()
def tensor_subclasses() -> nn.Module:
    bag = Bag(w=nn.Parameter(torch.randn(64, 64)))
    bag.tagged = torch.rand(64, 64).as_subclass(Tagged)
    bag.scaled = bag.tagged * 2
    return bag
