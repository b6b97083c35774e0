"""91,000 tensors in 163 shard files: what building and planning cost beside plain ``meta`` construction.

The files are sparse, of full size; only their headers hold data. Run: ``python benchmarks/many_tensors.py``.
Prints medians of alternating runs, the ratios that must stay below 2 each, and the same for half as many tensors
(the time must grow linearly).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import weightlift as wl

WIDTH = 256
FILES = 163


class Block(nn.Module):
    """Seven projections, as a decoder's experts have them."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))


def build(tensors: int) -> nn.Module:
    """A module with ``tensors`` parameters."""
    return nn.ModuleList([Block() for _ in range(tensors // 7)])


def write_checkpoint(folder: Path, names: list[str]) -> None:
    """Sparse safetensors files with an index."""
    nbytes = WIDTH * WIDTH * 4
    weight_map = {}
    per_file = -(-len(names) // FILES)
    for number in range(FILES):
        part = names[number * per_file : (number + 1) * per_file]
        header = {
            name: {"dtype": "F32", "shape": [WIDTH, WIDTH], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
            for i, name in enumerate(part)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # as the official writer aligns them
        path = folder / f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + len(part) * nbytes)
        weight_map.update(dict.fromkeys(part, path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def seconds(call: Callable[[], object]) -> float:
    """CPU time of this thread: steady on a busy machine."""
    gc.collect()
    start = time.thread_time()
    call()
    return time.thread_time() - start


def on_meta(tensors: int) -> nn.Module:
    with torch.device("meta"):
        return build(tensors)


def measure(tensors: int, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = tensors // 7 * 7
        write_checkpoint(folder, [key for key, _ in on_meta(tensors).named_parameters()])
        taken: dict[str, list[float]] = {"meta": [], "defer": [], "open": [], "plan": [], "whole": []}
        for _ in range(rounds):
            taken["meta"].append(seconds(lambda: on_meta(tensors)))
            taken["defer"].append(seconds(lambda: wl.defer(lambda: build(tensors))))
            handle = wl.defer(lambda: build(tensors))
            taken["open"].append(seconds(lambda: wl.open_checkpoint(folder)))
            taken["plan"].append(seconds(partial(handle.plan, folder)))
            del handle
            taken["whole"].append(seconds(lambda: wl.load(lambda: build(tensors), folder, workers=1)))
    medians = {what: statistics.median(times) for what, times in taken.items()}
    print(f"{count:,} tensors, {FILES} files, {rounds} alternating rounds, medians (thread CPU seconds)")
    for what, value in medians.items():
        print(f"  {what:6} {value:7.3f} s   {value / medians['meta']:5.2f} × meta")
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=91_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    half = measure(arguments.tensors // 2, arguments.rounds)
    whole = measure(arguments.tensors, arguments.rounds)
    for what in whole:
        print(f"  {what:6} grows {whole[what] / half[what]:.2f}× for 2× the tensors")


if __name__ == "__main__":
    main()
