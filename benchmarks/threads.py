"""Eight models on eight threads at once, beside the same eight one after the other."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import llama, peers
from benchmarks.harness import OURS, Case, Ready, touch

COUNT = 8


def prepare(folder: Path, scale: float) -> None:
    llama.save(folder, llama.config(0.25 * scale), torch.bfloat16)
    llama.save(folder / llama.TINY, llama.tiny_config(), torch.bfloat16)


def _load(folder: Path) -> nn.Module:
    model = peers.weightlift(folder, torch.float32)
    touch(model)
    return model


def at_once(folder: Path) -> Ready:
    _load(folder / llama.TINY)

    def timed() -> object:
        made: list[nn.Module] = []
        threads = [threading.Thread(target=lambda: made.append(_load(folder))) for _ in range(COUNT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == COUNT
        assert all(model.lm_head.weight is model.model.embed_tokens.weight for model in made)
        return made

    return timed


def one_after_the_other(folder: Path) -> Ready:
    _load(folder / llama.TINY)
    return lambda: [_load(folder) for _ in range(COUNT)]


CASES = (
    Case(
        "threads", "8 loads on 8 threads, 0.3 B Llama, bf16 → fp32", partial(prepare),
        {OURS: at_once, f"{OURS} (one after the other)": one_after_the_other}, target="≤ 1.1× the serial sum",
    ),
)  # fmt: skip
