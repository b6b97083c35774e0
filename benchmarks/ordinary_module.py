"""An ordinary module of 300 M parameters: `weightlift.load` beside construction and ``load_state_dict(load_file(…))``.

    python -m benchmarks.ordinary_module [--parameters 300] [--rounds 5]

Three modules: a Llama written by hand (of the shape of `benchmarks.llama`) and many narrow layers of torch's own, both
with torch's default initialisers, and one whose author calls ``orthogonal_``, ``trunc_normal_`` and ``randn(…) * s``.
Each is loaded both ways, alternating, in this process, from a warm file. Timed is the load, one read of every page,
and one forward run; the forward, measured alone on the module that is then ready, is subtracted. Reports medians, the
range and the ratio. The suite has the first two as cases, at 1.2 B parameters: the wide one has as many modules as
published models of that size, the narrow one eight times as many tensors.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weightlift as wl
from benchmarks.harness import OURS, Case, Ready, touch

WIDTH = 1024  # of the narrow layers
HIDDEN, KEYS, INNER, HEADS, VOCABULARY = 2048, 512, 8192, 32, 128_256  # of the Llama: see `benchmarks.llama.config`


class Block(nn.Module):
    """One layer of the Llama, 60.8 M parameters; rotary embeddings are left out, as they have none."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.query, self.output = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(HIDDEN, KEYS, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before_attention(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.output(y.transpose(1, 2).flatten(-2))
        y = self.before_mlp(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A Llama as one writes it by hand; its embedding is its head, too. 1,236 M parameters have 16 layers."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(min(VOCABULARY, millions * 106), HIDDEN)  # of a smaller one, a smaller share
        count = max(1, round((millions * 1e6 - self.embedding.weight.numel()) / 60.8e6))
        self.layers = nn.ModuleList(Block() for _ in range(count))
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.linear(self.norm(x), self.embedding.weight)


class Narrow(nn.Module):
    """Torch's own transformer layers (12.6 M parameters each at this width) under an embedding."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32_000, WIDTH)
        count = max(1, round((millions * 1e6 - 32_000 * WIDTH) / 12.6e6))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 16, 4 * WIDTH, batch_first=True, dropout=0.0) for _ in range(count)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class ByHand(Narrow):
    """The same with initialisers that a paper's code would call."""

    def __init__(self, millions: int) -> None:
        super().__init__(millions)
        for layer in self.layers:
            nn.init.trunc_normal_(layer.linear1.weight, std=0.02)
            nn.init.orthogonal_(layer.self_attn.out_proj.weight)
            layer.linear2.weight = nn.Parameter(torch.randn(WIDTH, 4 * WIDTH) * 0.02)


def ordinarily(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    module = build()
    module.load_state_dict(load_file(path))
    return module


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def load_seconds(load: Callable[[], nn.Module], tokens: torch.Tensor) -> float:
    """Load, every page and one forward, less a second forward of the same module."""
    gc.collect()
    made: list[nn.Module] = []

    def whole() -> None:
        made.append(load().eval())
        touch(made[0])
        made[0](tokens)

    with torch.inference_mode(False), torch.no_grad():
        taken = seconds(whole)
        return taken - seconds(lambda: made[0](tokens))


def measure(build: Callable[[], nn.Module], folder: Path, rounds: int) -> None:
    path = folder / "model.safetensors"
    module = build()
    count = sum(parameter.numel() for parameter in module.parameters())
    save_file(module.state_dict(), path)
    del module
    tokens = torch.arange(16).view(1, 16)
    ways: dict[str, Callable[[], nn.Module]] = {
        "construct + load_state_dict": lambda: ordinarily(build, path),
        "weightlift": lambda: wl.load(build, path, progress=False),
        "weightlift, copy=True": lambda: wl.load(build, path, progress=False, copy=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, load in ways.items():
            value = load_seconds(load, tokens)
            if round_number:  # the first warms imports and the file
                taken[name].append(value)
    base = taken["construct + load_state_dict"]
    print(f"{count:,} parameters, {rounds} alternating rounds, every page read, forward subtracted")
    for name, times in taken.items():
        ratios = [a / b for a, b in zip(base, times)]
        print(
            f"  {name:28} {statistics.median(times):8.3f} s   {statistics.median(ratios):6.1f}× "
            f"({min(ratios):.1f}–{max(ratios):.1f})"
        )


def prepare(folder: Path, scale: float, *, cls: type[nn.Module]) -> None:
    """The checkpoint of a case of the suite: 1.2 B parameters."""
    torch.save(max(20, round(1236 * scale)), folder / "millions.pt")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in cls(torch.load(folder / "millions.pt")).state_dict().items()}
    save_file({name: torch.full(shape, 0.01) for name, shape in shapes.items()}, folder / "model.safetensors")


def _timed(ours: bool, folder: Path, *, cls: type[nn.Module]) -> Ready:
    build = partial(cls, torch.load(folder / "millions.pt"))
    path = folder / "model.safetensors"
    if ours:
        tiny = nn.Linear(2, 2)
        wl.load(lambda: nn.Linear(2, 2), tiny.state_dict())  # what a first load imports is not timed

    def timed() -> nn.Module:
        module = wl.load(build, path, progress=False) if ours else ordinarily(build, path)
        touch(module)
        return module

    return timed


def _case(name: str, title: str, cls: type[nn.Module]) -> Case:
    return Case(
        name, f"{title}, fp32, every page touched", partial(prepare, cls=cls),
        {OURS: partial(_timed, True, cls=cls), "construct + load_state_dict": partial(_timed, False, cls=cls)},
        target="≥ 50× construction + load_state_dict",
    )  # fmt: skip


CASES = (
    _case("ordinary", "an ordinary module of 1.2 B parameters, a Llama by hand (146 tensors)", Llama),
    _case("ordinary-narrow", "an ordinary module of 1.2 B parameters, 95 layers 1,024 wide (1,141 tensors)", Narrow),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=300, help="in millions")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for cls in (Llama, Narrow, ByHand):
        print(f"{cls.__name__}: {cls.__doc__}")
        with tempfile.TemporaryDirectory() as folder:
            measure(partial(cls, arguments.parameters), Path(folder), arguments.rounds)


if __name__ == "__main__":
    main()
