"""What a load costs beside the bytes: Python, per tensor. Processor time in this process, alternating, best of several.

    python -m benchmarks.fixed_costs [layers] [model-types] [--only NAME …] [--rounds 5] [--count 100]

``layers``: modules of one kind of tiny layer each, from a state dict in memory, beside construction and
``load_state_dict``. ``model-types``: a tiny model of every model type of Transformers, beside its ``from_pretrained``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrizations

import weightlift as wl


class Layers(nn.Module):
    """``count`` layers of one kind."""

    def __init__(self, make: Callable[[], nn.Module], count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make() for _ in range(count)])


class WithTable(nn.Linear):
    """With a table of positions, as attention has it."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        angles = torch.arange(512)[:, None] * torch.exp(torch.arange(0, 64, 2) * (-math.log(10000.0) / 64))
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], dim=1))


class ByNumbers(nn.Linear):
    """With a table that is written number by number."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("table", torch.zeros(32, 32))
        for row, column in itertools.product(range(32), range(32)):
            self.table[row, column] = math.sin(row / 10 ** (column / 32))


class Overriding(nn.Linear):
    """With code of its own for the state dict."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[arg-type]


class Renaming(nn.Linear):
    """With a hook for the state dict, which does not look at the module."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self._register_load_state_dict_pre_hook(self.rename)

    def rename(self, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "conv": lambda: nn.Conv2d(4, 4, 3),
    "layer norm": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "embedding": lambda: nn.Embedding(4, 4),
    "LSTM": lambda: nn.LSTM(4, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "a table": WithTable,
    "a table by numbers": ByNumbers,
    "its own loading": Overriding,
    "a renaming hook": Renaming,
}


def paired(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The best seconds of each."""
    times: tuple[list[float], list[float]] = [], []
    for number in range(rounds + 1):  # the first one warms up
        for found, call in zip(times, (ours, theirs), strict=True):
            gc.collect()
            start = time.process_time()
            result = call()
            if number:
                found.append(time.process_time() - start)
            del result
    return min(times[0]), min(times[1])


def ordinary(build: Callable[[], nn.Module], state: dict[str, torch.Tensor]) -> nn.Module:
    module = build()
    module.load_state_dict(state)
    return module


def layers(options: argparse.Namespace) -> Iterator[tuple[str, int, float, float]]:
    for name, make in KINDS.items():
        if not options.only or name in options.only:
            build = partial(Layers, make, options.count)
            state = dict(build().state_dict())
            ours, theirs = partial(wl.load, build, state), partial(ordinary, build, state)
            yield (f"{options.count} × {name}", len(state), *paired(ours, theirs, options.rounds))


def model_types(options: argparse.Namespace) -> Iterator[tuple[str, int, float, float]]:
    from tests.parity import tiny

    tiny.quiet()
    for model_type in options.only or tiny.MODEL_TYPES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                cls = tiny.heads_first(model_type)[0]
                model = cls(tiny.tiny_config(model_type, cls))
                model.save_pretrained(folder)
                tiny.save_beside(model_type, Path(folder))
                count = len(model.state_dict())
                ours, theirs = partial(wl.from_pretrained, cls, folder), partial(cls.from_pretrained, folder)
                yield (f"{model_type} ({cls.__name__})", count, *paired(ours, theirs, options.rounds))
            except (Exception, SystemExit) as error:  # no tiny model of it, or a library that is not there
                print(f"{model_type}: left out: {error!r:.100}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["layers"], choices=["layers", "model-types"])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=100, help="layers of a module")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for what in options.what:
        ratios = []
        for name, count, ours, theirs in (layers if what == "layers" else model_types)(options):
            ratios.append(ours / theirs)
            each = f"{1e6 * ours / count:6.0f} µs a tensor"
            print(f"{1e3 * ours:8.1f} ms beside {1e3 * theirs:8.1f}  {ratios[-1]:5.2f}×  {each}  {name}", flush=True)
        if ratios:
            slower = sum(ratio > 1 for ratio in ratios)
            print(f"{what}: median {statistics.median(ratios):.2f}×, more in {slower} of {len(ratios)}\n")


if __name__ == "__main__":
    main()
