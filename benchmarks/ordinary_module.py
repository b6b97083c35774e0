"""An ordinary module of 300 M parameters: `weightlift.load` beside construction and ``load_state_dict(load_file(…))``.

    python -m benchmarks.ordinary_module [--parameters 300] [--rounds 5]

Two modules: one with the default initialisers of torch's own layers, and one written by hand that calls
``orthogonal_``, ``trunc_normal_`` and ``randn(…) * s``. Each is loaded both ways, alternating, in this process, from a
warm file. Timed is the load, one read of every page, and one forward run; the forward, measured alone on the module
that is then ready, is subtracted. Reports medians, the range and the ratio.
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

WIDTH = 1024


class Plain(nn.Module):
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


class ByHand(Plain):
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


def prepare(folder: Path, scale: float) -> None:
    """The checkpoint of the suite's case "ordinary": 1.2 B parameters."""
    torch.save(max(20, round(1200 * scale)), folder / "millions.pt")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Plain(torch.load(folder / "millions.pt")).state_dict().items()}
    save_file({name: torch.full(shape, 0.01) for name, shape in shapes.items()}, folder / "model.safetensors")


def _case(ours: bool, folder: Path) -> Ready:
    build = partial(Plain, torch.load(folder / "millions.pt"))
    path = folder / "model.safetensors"
    if ours:
        tiny = nn.Linear(2, 2)
        wl.load(lambda: nn.Linear(2, 2), tiny.state_dict())  # what a first load imports is not timed

    def timed() -> nn.Module:
        module = wl.load(build, path, progress=False) if ours else ordinarily(build, path)
        touch(module)
        return module

    return timed


CASES = (
    Case(
        "ordinary", "an ordinary module of 1.2 B parameters, fp32, every page touched", prepare,
        {OURS: partial(_case, True), "construct + load_state_dict": partial(_case, False)},
        target="≥ 50× construction + load_state_dict",
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=300, help="in millions")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for cls in (Plain, ByHand):
        print(f"{cls.__name__}: {cls.__doc__}")
        with tempfile.TemporaryDirectory() as folder:
            measure(partial(cls, arguments.parameters), Path(folder), arguments.rounds)


if __name__ == "__main__":
    main()
