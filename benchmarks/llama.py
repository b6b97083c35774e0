"""A Llama of 1.2 B parameters (the shape of Llama-3.2-1B), tied, in two shard files; and a tiny one to warm up with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TINY = "tiny"


def config(scale: float = 1.0, **changes: Any) -> Any:
    """``scale`` 1 is full size; less makes fewer layers and a smaller vocabulary."""
    from transformers import LlamaConfig

    layers = max(1, round(16 * scale))
    values: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": max(1024, round(128_256 * scale)), "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    return LlamaConfig(**{**values, **changes})


def tiny_config() -> Any:
    """A few thousand parameters."""
    return config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )  # fmt: skip


def write(folder: Path, scale: float, dtype: torch.dtype) -> None:
    """The checkpoint, and a tiny one of the same kind in ``folder/tiny``."""
    save(folder, config(scale), dtype)
    save(folder / TINY, tiny_config(), dtype)


def save(folder: Path, config: Any, dtype: torch.dtype, shard_files: int = 2) -> None:
    """Weights of small random values (what they are does not matter to a loader), without the tied head."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    order = list(names)
    step = -(-len(order) // shard_files)
    for number in range(shard_files):
        file = f"model-{number + 1:05d}-of-{shard_files:05d}.safetensors"
        part = order[number * step : (number + 1) * step]
        tensors = {name: torch.randn(names[name], generator=generator, dtype=torch.bfloat16) for name in part}
        save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
