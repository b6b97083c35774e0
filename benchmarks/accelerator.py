"""A 1.2 B Llama onto the GPU, warm."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama
from benchmarks.harness import CEILING, Case, Ready

BF16 = torch.bfloat16


def _ours(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    import weightlift as wl

    return wl.from_pretrained(AutoModelForCausalLM, folder, dtype=BF16, device_map="cuda")


def _transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, device_map="cuda")


def _safetensors(folder: Path) -> Any:
    from safetensors.torch import load_file

    return [load_file(file, device="cuda") for file in sorted(folder.glob("*.safetensors"))]


def _instanttensor(folder: Path) -> Any:
    from instanttensor import safe_open  # type: ignore[import-not-found]

    files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
    with safe_open(files, framework="pt", device=0) as opened:
        return dict(opened.tensors())


def _fastsafetensors(folder: Path) -> Any:
    from fastsafetensors import ParallelLoader

    files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
    loader = ParallelLoader(None, files, device="cuda:0", nogds=True, use_tqdm_on_load=False)
    try:
        return dict(loader.iterate_weights())
    finally:
        loader.close()


def _ready(load: Any, folder: Path) -> Ready:
    load(folder / llama.TINY)
    torch.cuda.synchronize()

    def timed() -> object:
        model = load(folder)
        torch.cuda.synchronize()
        return model

    return timed


def pinned_copy(folder: Path) -> Ready:
    """The same bytes from pinned memory, in one stream: the bus's limit."""
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    piece = 64 << 20
    source = torch.empty(piece, dtype=torch.uint8, pin_memory=True)
    torch.cuda.synchronize()

    def timed() -> object:
        target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        for start in range(0, nbytes, piece):
            part = target[start : start + piece]
            part.copy_(source[: part.numel()], non_blocking=True)
        torch.cuda.synchronize()
        return target

    return timed


CASES = (
    Case(
        "accelerator", "warm, bf16 onto the GPU, 1.2 B Llama", partial(llama.write, dtype=BF16),
        {
            "weightlift": partial(_ready, _ours), "transformers": partial(_ready, _transformers),
            "safetensors": partial(_ready, _safetensors), "fastsafetensors": partial(_ready, _fastsafetensors),
            "instanttensor": partial(_ready, _instanttensor), f"{CEILING}pinned copy": pinned_copy,
        },
        target="≥ 90% of a pinned copy, ≥ every peer", needs="cuda",
    ),
)  # fmt: skip
