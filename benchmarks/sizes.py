"""Checkpoints of 1 to 16 GB into memory of their own: time in proportion, memory the model and the budget.

The shard files of 1 GB are sparse, so that making them costs nothing; reading them fills the page cache as ever.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import OURS, Case, Ready

WIDTH, ROWS, LAYERS = 4096, 4096, 15  # of fp32: 1.007 GB a shard file
SIZES = (1, 2, 4, 8, 16)


def prepare(folder: Path, scale: float) -> None:
    """One folder a size; the larger ones hold the files of the smaller by hard links."""
    rows = max(1, round(ROWS * scale))
    nbytes = WIDTH * rows * 4
    whole = folder / "files"
    whole.mkdir()
    for number in range(max(SIZES)):
        header = {
            f"layers.{number * LAYERS + layer}.weight": {
                "dtype": "F32", "shape": [rows, WIDTH], "data_offsets": [layer * nbytes, (layer + 1) * nbytes],
            }
            for layer in range(LAYERS)
        }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (whole / f"{number:02}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + LAYERS * nbytes)
    for size in SIZES:
        (folder / str(size)).mkdir()
        weight_map = {}
        for number in range(size):
            name = f"{number:02}.safetensors"
            os.link(whole / name, folder / str(size) / name)
            weight_map |= {f"layers.{number * LAYERS + layer}.weight": name for layer in range(LAYERS)}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / str(size) / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(rows, folder / "rows.pt")


def _case(size: int, folder: Path) -> Ready:
    import weightlift as wl

    rows = torch.load(folder / "rows.pt")

    def build() -> nn.Module:
        module = nn.Module()
        module.layers = nn.ModuleList(nn.Linear(WIDTH, rows, bias=False) for _ in range(size * LAYERS))
        return module

    return lambda: wl.load(build, folder / str(size), copy=True, progress=False)


CASES = (
    Case(
        "sizes", "1, 2, 4, 8 and 16 GB, fp32, copy=True", prepare,
        {OURS if size == 1 else f"{size} GB": partial(_case, size) for size in SIZES},
        target="time in proportion; memory the model and the budget",
    ),
)  # fmt: skip
