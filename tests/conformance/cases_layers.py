"""The layers of torch.nn, and what torch.nn.utils makes of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from .cases import Bag, add, case, equal, holds, near


def layer(name: str, fn: Any, inputs: Any = None, **options: Any) -> None:
    def build() -> nn.Module:
        return fn()

    add(name, build, __name__, inputs=inputs, **options)


def x(*shape: int) -> Any:
    return lambda: (torch.rand(*shape),)


layer("linear", lambda: nn.Linear(64, 64), x(3, 64))
layer("linear_no_bias", lambda: nn.Linear(64, 64, bias=False), x(3, 64))
layer("bilinear", lambda: nn.Bilinear(16, 16, 16), lambda: (torch.rand(2, 16), torch.rand(2, 16)))
layer("conv1d", lambda: nn.Conv1d(16, 32, 5, groups=4), x(2, 16, 20))
layer("conv2d", lambda: nn.Conv2d(16, 32, 3, padding_mode="circular", padding=1), x(2, 16, 8, 8))
layer("conv3d", lambda: nn.Conv3d(4, 8, 3), x(1, 4, 5, 5, 5))
layer("conv_transpose_1d", lambda: nn.ConvTranspose1d(16, 16, 3), x(1, 16, 9))
layer("conv_transpose_2d", lambda: nn.ConvTranspose2d(16, 16, 3, stride=2), x(1, 16, 5, 5))
layer("conv_transpose_3d", lambda: nn.ConvTranspose3d(4, 8, 3), x(1, 4, 4, 4, 4))
layer("embedding", lambda: nn.Embedding(128, 64), lambda: (torch.arange(9),))
layer(
    "embedding_padding",
    lambda: nn.Embedding(128, 64, padding_idx=3),
    lambda: (torch.arange(9),),
    check=lambda m: holds((m.weight[3] == 0).all(), "the padding row is not zero"),
)
layer("embedding_max_norm", lambda: nn.Embedding(64, 64, max_norm=1.0), lambda: (torch.arange(9),))
layer("embedding_bag", lambda: nn.EmbeddingBag(128, 64, mode="sum"), lambda: (torch.arange(8).view(2, 4),))
layer("batch_norm", lambda: nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), x(4, 64))
layer("batch_norm_2d", lambda: nn.BatchNorm2d(16), x(2, 16, 4, 4), kind="exact")
layer("sync_batch_norm", lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(16)), kind="exact")
layer("instance_norm", lambda: nn.InstanceNorm2d(16, affine=True, track_running_stats=True), kind="exact")
layer("group_layer_rms_norm", lambda: nn.Sequential(nn.GroupNorm(4, 16), nn.LayerNorm(8), nn.RMSNorm(8)), kind="exact")
layer("prelu", lambda: nn.PReLU(16), x(2, 16), kind="exact")
layer("lstm", lambda: nn.LSTM(32, 32, 2, bidirectional=True, proj_size=16), x(2, 5, 32))
layer("gru", lambda: nn.GRU(32, 32, 2, batch_first=True), x(2, 5, 32))
layer("rnn", lambda: nn.RNN(32, 32), x(2, 5, 32))
layer("cells", lambda: nn.ModuleList([nn.RNNCell(32, 32), nn.LSTMCell(32, 32), nn.GRUCell(32, 32)]))
layer("attention", lambda: nn.MultiheadAttention(64, 4), lambda: (torch.rand(5, 2, 64),) * 3)
layer("attention_kdim", lambda: nn.MultiheadAttention(64, 4, kdim=32, vdim=48, add_bias_kv=True))
layer("encoder_layer", lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), x(2, 5, 64))
layer(
    "encoder",
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 3),
    x(5, 2, 32),
    check=lambda m: equal(m.layers[0].linear1.weight, m.layers[2].linear1.weight, "deep copies of one layer"),
)
layer(
    "transformer",
    lambda: nn.Transformer(32, 4, 2, 2, 64),
    lambda: (torch.rand(5, 2, 32), torch.rand(4, 2, 32)),
)
layer("adaptive_softmax", lambda: nn.AdaptiveLogSoftmaxWithLoss(32, 60, [10, 30]))
layer("two_hundred_small_layers", lambda: nn.ModuleList([nn.Linear(8, 8) for _ in range(200)]))
layer(
    "deep_sequential",
    lambda: nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(20)]),
    x(2, 16),
)
layer(
    "parameter_list_dict",
    lambda: Bag(
        a=nn.ParameterList([torch.randn(64, 8), nn.Parameter(torch.zeros(3))]),
        b=nn.ParameterDict({"w": torch.rand(64, 8), "c": nn.Parameter(torch.ones(2))}),
    ),
)


@case(inputs=lambda: (torch.arange(5),))
def embedding_from_pretrained_sample() -> nn.Module:
    return nn.Embedding.from_pretrained(torch.randn(64, 32) * 3, freeze=False, padding_idx=0)


TABLE = torch.arange(2048.0).view(64, 32)


@case(kind="exact", inputs=lambda: (torch.arange(5),), loadable=False)
def embedding_from_pretrained_closure() -> nn.Module:
    """The tensor existed before: it is used as it is, shared with its owner (so nothing may be loaded over it here)."""
    return nn.Embedding.from_pretrained(TABLE)


@case(kind="exact", inputs=lambda: (torch.arange(5),))
def embedding_from_closure_copied() -> nn.Module:
    emb = nn.Embedding(64, 32)
    emb.weight.data.copy_(TABLE)
    return emb


@case(inputs=x(3, 64))
def reset_parameters_again() -> nn.Module:
    m = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    for child in m:
        child.reset_parameters()
    return m


# -- normalised weights ----------------------------------------------------------------------------------------------


def _weight_norm(m: Any) -> None:
    near(m.weight_g.flatten(), m.weight_v.norm(dim=1), "g is the norm of v")


@case(check=None, inputs=x(3, 64))
def weight_norm_old() -> nn.Module:
    m = nn.utils.weight_norm(nn.Linear(64, 64))
    _weight_norm(m)
    return m


@case(inputs=x(3, 64))
def weight_norm_parametrization() -> nn.Module:
    m = parametrizations.weight_norm(nn.Linear(64, 64), dim=0)
    p = m.parametrizations.weight
    near(p.original0.flatten(), p.original1.norm(dim=1), "g is the norm of v")
    return m


@case(inputs=lambda: (torch.rand(1, 16, 9),))
def weight_norm_conv_after_init() -> nn.Module:
    conv = nn.Conv1d(16, 16, 3)
    nn.init.normal_(conv.weight, std=0.02)
    return parametrizations.weight_norm(conv)


@case()
def weight_norm_removed_again() -> nn.Module:
    lin = nn.utils.weight_norm(nn.Linear(64, 64))
    other = parametrizations.weight_norm(nn.Linear(64, 64))
    nn.utils.remove_weight_norm(lin)
    parametrize.remove_parametrizations(other, "weight")
    return Bag(lin=lin, other=other)


@case(inputs=x(3, 64))
def spectral_norm_old() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(64, 64))


@case(inputs=x(3, 64))
def spectral_norm_parametrization() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(64, 64), n_power_iterations=3)


@case(inputs=x(3, 64))
def orthogonal_parametrization() -> nn.Module:
    m = parametrizations.orthogonal(nn.Linear(64, 64))
    near(m.weight @ m.weight.T, torch.eye(64), "the weight is orthogonal")
    return m


@case(inputs=x(3, 64))
def orthogonal_parametrization_without_base() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(64, 32), use_trivialization=False, orthogonal_map="cayley")


class Symmetric(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


class Positive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(64, 64) + 0.5)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w.exp() * self.scale

    def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
        return (w.abs() + 0.1).log()


@case(inputs=x(3, 64))
def custom_parametrizations() -> nn.Module:
    m = nn.Linear(64, 64)
    parametrize.register_parametrization(m, "weight", Positive())
    parametrize.register_parametrization(m, "weight", Symmetric())
    return m


@case(inputs=x(3, 64), positional=False)
def pruned_by_magnitude_and_at_random() -> nn.Module:
    m = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    prune.l1_unstructured(m[0], "weight", amount=0.5)
    prune.random_unstructured(m[1], "weight", amount=0.3)
    prune.ln_structured(m[2], "weight", amount=0.25, n=2, dim=0)
    prune.remove(m[2], "weight")
    return m


# -- copies of layers ------------------------------------------------------------------------------------------------


def _copies(m: Any) -> None:
    equal(m.a.weight, m.b.weight, "a and its copy")


@case(check=_copies)
def deepcopied_layer() -> nn.Module:
    a = nn.Linear(64, 64)
    return Bag(a=a, b=copy.deepcopy(a))


@case()
def deepcopied_then_the_copy_initialised_again() -> nn.Module:
    a = nn.Linear(64, 64)
    b, c = copy.deepcopy(a), copy.deepcopy(a)
    b.reset_parameters()
    nn.init.orthogonal_(c.weight)
    return Bag(a=a, b=b, c=c)


@case(check=lambda m: equal(m.b.weight, m.c.weight, "copies of a's first values"))
def deepcopied_then_the_source_initialised_again() -> nn.Module:
    a = nn.Linear(64, 64)
    b, c = copy.deepcopy(a), copy.deepcopy(a)
    nn.init.uniform_(a.weight, 4, 5)
    return Bag(a=a, b=b, c=c)


@case(check=lambda m: holds(m.t.tied.weight is m.s.tied.weight, "the tie inside the copy"))
def deepcopied_module_with_ties_and_buffers() -> nn.Module:
    inner = Bag(e=nn.Embedding(64, 32), h=nn.Linear(32, 64, bias=False), r=torch.randn(64, 64))
    inner.h.weight = inner.e.weight
    inner.plain = torch.rand(64, 8)
    shared = Bag(tied=nn.Linear(8, 8))
    return Bag(inner=inner, copied=copy.deepcopy(inner), s=shared, t=copy.copy(shared))


@case(check=lambda m: equal(m.b, m.a, "a deep copy of a buffer"))
def deepcopied_tensors() -> nn.Module:
    a = torch.randn(64, 64)
    first = copy.deepcopy(a)
    view = copy.deepcopy(a[3:5])
    p = nn.Parameter(torch.rand(64, 64))
    return Bag(a=a, b=first, view=view, p=p, q=copy.deepcopy(p))


@case(check=lambda m: equal(m.ema.weight, m.live.weight, "the EMA starts as a copy"))
def exponential_moving_average() -> nn.Module:
    live = nn.Linear(64, 64)
    ema = copy.deepcopy(live).requires_grad_(False).eval()
    for slow, fast in zip(ema.parameters(), live.parameters(), strict=True):
        slow.data.copy_(fast.data)
    return Bag(live=live, ema=ema)


@case(inputs=x(3, 64))
def skip_init_then_initialised() -> nn.Module:
    m = nn.utils.skip_init(nn.Linear, 64, 64)
    nn.init.normal_(m.weight, std=0.1)
    nn.init.zeros_(m.bias)
    return m


@case(inputs=x(3, 64))
def to_empty_then_initialised() -> nn.Module:
    with torch.device("meta"):
        m = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    m.to_empty(device="cpu")
    for child in m:
        child.reset_parameters()
    return m


@case(inputs=x(3, 64))
def lazy_layers_with_a_dry_run() -> nn.Module:
    m = nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(8)).eval()
    m(torch.zeros(2, 64))
    return m.train()


@case(kind="exact", undefined=("w", "b", "later"))
def left_empty() -> nn.Module:
    """Nobody ever gives these values: a checkpoint will."""
    return Bag(w=nn.Parameter(torch.empty(64, 64)), b=torch.empty(16), later=nn.Parameter(torch.Tensor(4, 4)))


@case(inputs=x(1, 3, 8, 8))
def fused_conv_and_batch_norm() -> nn.Module:
    conv, norm = nn.Conv2d(3, 16, 3).eval(), nn.BatchNorm2d(16).eval()
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return nn.utils.fuse_conv_bn_eval(conv, norm)
