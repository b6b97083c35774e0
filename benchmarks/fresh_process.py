"""A program that only loads a small model: from the start of the process until it is ready."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from benchmarks import llama, peers
from benchmarks.harness import Case, Ready, touch


def prepare(folder: Path, scale: float) -> None:
    llama.save(folder, llama.config(0.1 * scale), torch.bfloat16)


def _ready(name: str, folder: Path) -> Ready:
    def timed() -> object:
        model = peers.LOADS[name](folder, torch.bfloat16)
        touch(model)
        return model

    return timed


CASES = (
    Case(
        "fresh-process", "import and load of a small Llama, the whole process", prepare,
        {name: partial(_ready, name) for name in ("weightlift", "transformers")},
        target="≤ 1.05× the peer", fresh=True,
    ),
)  # fmt: skip
