"""What a trace costs: the same loads with and without ``trace=``, alternating, in this process.

    python -m benchmarks.tracing [--rounds 21]

Two loads: large weights that are converted (few, long events), and thousands of small tensors copied (the worst case:
an event a block). Reports the median of the rounds' ratios of wall and of processor time, with its 95% interval.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import weightlift as wl

BF16 = torch.bfloat16


def stack(count: int, width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def timed(call: Callable[[], object]) -> tuple[float, float]:
    gc.collect()
    wall, processor = time.perf_counter(), time.process_time()
    kept = call()
    taken = time.perf_counter() - wall, time.process_time() - processor
    del kept
    return taken


def interval(values: list[float]) -> tuple[float, float]:
    """95% of the medians of samples drawn from the values with replacement."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[49], medians[1949]


def measure(name: str, count: int, width: int, rounds: int, folder: Path) -> None:
    path = folder / f"{name}.safetensors"
    save_file({f"{i}.weight": torch.full((width, width), 0.5, dtype=BF16) for i in range(count)}, path)
    load = partial(wl.load, partial(stack, count, width), path, dtype=torch.float32, progress=False)
    ratios: tuple[list[float], list[float]] = [], []
    for number in range(rounds + 1):
        ways = [load, partial(load, trace=folder / "trace.html")]
        first = number % 2
        taken = {way: timed(ways[way]) for way in (first, 1 - first)}
        if number:  # the first warms imports and the file
            for index, values in enumerate(ratios):
                values.append(taken[1][index] / taken[0][index])
    print(f"{name}: {count:,} tensors of {width * width * 2 / 1e6:.3f} MB, {rounds} pairs, with a trace over without")
    for what, values in zip(("wall", "processor"), ratios, strict=True):
        low, high = interval(values)
        print(f"  {what:9} time {statistics.median(values):.3f} ({low:.3f}–{high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure("large", 60, 4096, arguments.rounds, Path(folder))
        measure("small", 10_000, 128, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
