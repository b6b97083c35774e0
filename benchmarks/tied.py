"""A tied embedding of 256,000 × 2,304 (Gemma-2-2b's) on two layers: its checkpoint without the head, and with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama, peers
from benchmarks.harness import OURS, Case, Ready

BF16, FP32 = torch.bfloat16, torch.float32
_WHOLE, _TIED = "whole", "tied"


def _config(scale: float, **changes: Any) -> Any:
    from transformers import Gemma2Config

    values: dict[str, Any] = {
        "vocab_size": max(1024, round(256_000 * scale)), "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return Gemma2Config(**{**values, **changes})


def prepare(folder: Path, scale: float) -> None:
    from safetensors.torch import load_file, save_file

    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    for config, parent in ((_config(scale), folder), (_config(0, **tiny, head_dim=16), folder / llama.TINY)):
        for name in (_TIED, _WHOLE):
            llama.save(parent / name, config, BF16, shard_files=1)
        path = parent / _WHOLE / "model-00001-of-00001.safetensors"
        state = load_file(path)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, path, metadata={"format": "pt"})
        index = path.with_name("model.safetensors.index.json")
        name = '"model.embed_tokens.weight"'
        index.write_text(index.read_text().replace(name, f'"lm_head.weight": "{path.name}", {name}'))


def _ready(load: peers.Load, which: str, dtype: torch.dtype, folder: Path) -> Ready:
    load(folder / llama.TINY / which, dtype)

    def timed() -> Any:
        model = load(folder / which, dtype)
        peers.touch(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return model

    return timed


def _contenders(dtype: torch.dtype) -> dict[str, Any]:
    return {
        OURS: partial(_ready, peers.weightlift, _TIED, dtype),
        "weightlift (head in the checkpoint)": partial(_ready, peers.weightlift, _WHOLE, dtype),
        "transformers": partial(_ready, peers.transformers, _TIED, dtype),
        "transformers (head in the checkpoint)": partial(_ready, peers.transformers, _WHOLE, dtype),
    }


CASES = (
    Case(
        "tied", "tied 256k × 2304 embedding, bf16, checkpoint without and with the head", prepare,
        _contenders(BF16), target="≤ 1.0× the time with the head present",
    ),
    Case(
        "tied-up-cast", "the same, bf16 → fp32", prepare,
        _contenders(FP32), target="≤ 1.0× the time with the head present",
    ),
)  # fmt: skip
