"""Nothing is done in vain: modules of 64 MiB and more are built, planned and loaded without any initialiser running.

Memory is measured (resident, and its peak) while `defer` runs; sampling and decompositions are counted by the profiler,
on all threads, while `load` runs: the constructor's own calls lie before it, so that any there is a replay.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

from .cases import Bag, holds, script

SIDE = 4096  # squared, in float32: 64 MiB
ALLOWED = 4 << 20
PEAK_ALLOWED = 12 << 20
WORK = {
    "normal_", "uniform_", "random_", "bernoulli_", "randperm", "randn", "rand", "erfinv_", "linalg_qr", "geqrf",
    "norm", "linalg_vector_norm", "mm", "addmm", "argsort", "sort", "exponential_",
}  # fmt: skip


def resident() -> tuple[int, int]:
    """Resident bytes now, and their peak since `forget_peak`."""
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return int(fields["VmRSS"].split()[0]) << 10, int(fields["VmHWM"].split()[0]) << 10


def forget_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return False
    return True


def counted(action: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """Run it; how often work was done meanwhile, by any thread."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], experimental_config=_ExperimentalConfig(profile_all_threads=True)
    ) as profiler:
        result = action()
    calls: dict[str, int] = {}
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")
        if name in WORK:
            calls[name] = calls.get(name, 0) + event.count
    return result, calls


def lazily(
    name: str, build: Callable[[int], nn.Module], *, load: bool = True, sized: bool = True, tape: int = 0
) -> None:
    """`load=False`: something outside the parameters is computed from a sample, so that loading has to run it.
    `tape`: bytes that recording itself may take, where an initialiser makes thousands of calls."""

    def run() -> None:
        import weightlift as wl

        small = wl.defer(lambda: build(16))
        small.materialize()
        _load_all(lambda: build(16), wl)
        gc.collect()
        watched = forget_peak()
        before, _ = resident()
        handle = wl.defer(lambda: build(SIDE))
        after, peak = resident()
        holds(after - before < ALLOWED + tape, f"defer() made {(after - before) >> 10} KiB resident")
        holds(not watched or peak - before < PEAK_ALLOWED + tape, f"defer() peaked at {(peak - before) >> 10} KiB more")
        if sized:
            with torch.device("meta"):
                tensors = list(build(16).parameters())
            holds(len(tensors) > 0, "nothing to measure")
            holds(handle.nbytes >= SIDE * SIDE * 4, f"handle.nbytes is {handle.nbytes}")
            holds(handle.numel >= SIDE * SIDE, f"handle.numel is {handle.numel}")
        if not load:
            return
        del handle
        module, calls = _load_all(lambda: build(SIDE), wl)
        holds(not calls, f"load() of a whole checkpoint did work: {calls}")
        for key, value in module.state_dict().items():
            holds(float(value.flatten()[-1]) == 0.0, f"{key}: not the checkpoint's values")

    run.__name__, run.__module__ = name, __name__
    script(guarded_only=True)(run)


def _load_all(build: Callable[[], nn.Module], wl: Any) -> tuple[nn.Module, dict[str, int]]:
    """Everything from a checkpoint of untouched zeros."""
    with torch.device("meta"):
        shapes = {k: (v.shape, v.dtype) for k, v in _skeleton(build).items()}
    state = {k: torch.zeros(shape, dtype=dtype) for k, (shape, dtype) in shapes.items()}
    handle = wl.defer(build)
    module, calls = counted(lambda: handle.load(state))
    return module, calls


def _skeleton(build: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """The state dict's shapes: on meta, where initialisers cost nothing."""
    return {k: v for k, v in build().state_dict().items() if isinstance(v, torch.Tensor)}


def _with(fn: Callable[[Any], Any]) -> Callable[[int], nn.Module]:
    def build(n: int) -> nn.Module:
        w = nn.Parameter(torch.empty(n, n))
        fn(w)
        return Bag(w=w)

    return build


def _of(fn: Callable[[int], Any]) -> Callable[[int], nn.Module]:
    return lambda n: Bag(w=nn.Parameter(fn(n)))


def _scale(n: int) -> torch.Tensor:
    t = torch.empty(n, n)
    t.normal_()
    return t * (1 / math.sqrt(n))


def _copies(n: int) -> nn.Module:
    first = nn.Linear(n, n)
    return nn.ModuleList([first, copy.deepcopy(first)])


def _scratch(n: int) -> nn.Module:
    scratch, bag = torch.empty(n, n), Bag()
    for i in range(3):
        scratch.normal_()
        bag.register_parameter(f"p{i}", nn.Parameter(scratch.clone()))
    return bag


def _sparse(w: Any) -> None:
    if not w.is_meta:
        nn.init.sparse_(w, 0.001)


def _orthogonal(w: Any) -> None:
    if not w.is_meta:
        nn.init.orthogonal_(w)


lazily("linear", lambda n: nn.Linear(n, n))
lazily("kaiming_uniform", _with(lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5))))
lazily("xavier_normal", _with(nn.init.xavier_normal_))
lazily("trunc_normal_wide", _with(lambda w: nn.init.trunc_normal_(w, std=0.02)))
lazily("trunc_normal_one_std", _with(lambda w: nn.init.trunc_normal_(w, std=1.0, a=-1.0, b=1.0)))
lazily("trunc_normal_narrow", _with(lambda w: nn.init.trunc_normal_(w, std=1.0, a=-0.2, b=0.2)))
lazily("trunc_normal_erfinv", _with(lambda w: w.data.uniform_(-0.9, 0.9).erfinv_().mul_(0.02).clamp_(-1, 1)))
lazily("orthogonal", _with(_orthogonal))
lazily("sparse", _with(_sparse), tape=SIDE * 4096)  # some calls for every column
lazily("eye", _with(nn.init.eye_))
lazily("dirac", lambda n: Bag(w=nn.Parameter(nn.init.dirac_(torch.empty(n // 4, n // 4, 4, 4)))))
lazily("randn_scaled", _of(lambda n: torch.randn(n, n) * 0.02))
lazily("empty_normal_scaled", _of(_scale))
lazily("cat_of_samples", _of(lambda n: torch.cat([torch.randn(n // 2, n), torch.zeros(n // 2, n)])))
lazily(
    "stack_clamp_cast",
    _of(lambda n: torch.stack([torch.rand(n, n).clamp(0, 0.5) for _ in range(2)]).half()),
    sized=False,
)
lazily("tril_of_sample", _of(lambda n: torch.tril(torch.randn(n, n))))
lazily("matmul_of_samples", _of(lambda n: torch.randn(n, 8) @ torch.randn(8, n)))
lazily("through_views", _with(lambda w: [part.normal_() for part in w.data.chunk(4)]))
lazily("padding_index", lambda n: nn.Embedding(n, n, padding_idx=0))
lazily("weight_norm", lambda n: parametrizations.weight_norm(nn.Linear(n, n)))
lazily("spectral_norm", lambda n: parametrizations.spectral_norm(nn.Linear(n, n)), load=False)
lazily("lstm", lambda n: nn.LSTM(n // 2, n // 2), sized=False)
lazily("attention", lambda n: nn.MultiheadAttention(n // 2, 4), sized=False)
lazily("conv", lambda n: nn.Conv2d(n // 4, n // 4, 4))
lazily("deepcopied_layer", _copies)
lazily("scratch_buffer", _scratch)
lazily("half_precision", lambda n: nn.Linear(n, 2 * n).half(), sized=True)
lazily("cast_to_bfloat16", lambda n: nn.Sequential(nn.Linear(n, 2 * n)).to(torch.bfloat16))
lazily("channels_last", lambda n: nn.Conv2d(n // 4, n // 4, 4).to(memory_format=torch.channels_last))
lazily("encoder_of_copies", lambda n: nn.TransformerEncoder(nn.TransformerEncoderLayer(n // 4, 4), 2), sized=False)


@script(guarded_only=True)
def forty_gibibytes() -> None:
    """More than the machine has: nothing may be committed."""
    import weightlift as wl

    wl.defer(lambda: nn.Linear(8, 8))
    before, _ = resident()
    handle = wl.defer(lambda: nn.ModuleList([nn.Linear(32768, 32768, bias=False) for _ in range(10)]))
    after, _ = resident()
    holds(after - before < ALLOWED, f"{(after - before) >> 10} KiB became resident")
    holds(handle.numel == 10 * 32768**2 and handle.nbytes == 40 * 32768**2, f"{handle.numel}, {handle.nbytes}")


@script(guarded_only=True)
def thirty_thousand_small_tensors() -> None:
    """30,000 of 64 KiB: a mapping each would come near vm.max_map_count."""
    import weightlift as wl

    handle = wl.defer(lambda: nn.ParameterList([nn.Parameter(torch.empty(16384).normal_()) for _ in range(30_000)]))
    with open("/proc/self/maps") as f:
        maps = sum(1 for _ in f)
    holds(maps < 10_000, f"{maps} mappings")
    state = {str(i): torch.zeros(1).expand(16384) for i in range(30_000)}
    del handle, state


@script(guarded_only=True)
def memory_of_a_dropped_handle_is_given_back() -> None:
    import weightlift as wl

    def size() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[0]) * 4096

    wl.defer(lambda: nn.Linear(8, 8))
    gc.collect()
    before = size()
    for _ in range(5):
        wl.defer(lambda: nn.Linear(32768, 32768))
        gc.collect()
    holds(size() - before < 1 << 32, f"{(size() - before) >> 30} GiB of reservations remain")
