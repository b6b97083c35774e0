"""Very many small tensors: Llamas of thousands of narrow layers, nine tensors each."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from benchmarks import llama, peers
from benchmarks.harness import Case


def prepare(folder: Path, scale: float, *, layers: int) -> None:
    tiny = llama.tiny_config()
    llama.save(folder / llama.TINY, tiny, torch.bfloat16)
    wide = llama.tiny_config()
    wide.num_hidden_layers = max(1, round(layers * scale))
    if hasattr(wide, "layer_types") and wide.layer_types is not None:
        wide.layer_types = [wide.layer_types[0]] * wide.num_hidden_layers
    llama.save(folder, wide, torch.bfloat16)


CASES = tuple(
    Case(
        f"tensors-{thousands}k", f"{thousands},000 tensors of a few kB each", partial(prepare, layers=layers),
        peers.contenders(torch.bfloat16, ("weightlift", "transformers", "accelerate", "safetensors")),
        target="≥ 3× transformers' time per tensor; linear",
    )
    for thousands, layers in ((18, 2_000), (91, 10_111))
)  # fmt: skip
