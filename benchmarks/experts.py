"""A Mixtral of 16 experts whose weights are fused on load (checkpoint: a tensor an expert; module: one for all)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import llama, peers
from benchmarks.harness import Case


def _config(scale: float, **changes: Any) -> Any:
    from transformers import MixtralConfig

    values: dict[str, Any] = {
        "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": max(1, round(7 * scale)),
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 16, "vocab_size": 32_000,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return MixtralConfig(**{**values, **changes})


def _write(folder: Path, config: Any) -> None:
    """The names that published Mixtral checkpoints have."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads
    head = hidden // config.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        for name, rows in (("q_proj", hidden), ("k_proj", kv * head), ("v_proj", kv * head), ("o_proj", hidden)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, hidden)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            prefix = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{prefix}.w1.weight": (inner, hidden), f"{prefix}.w3.weight": (inner, hidden)}
            shapes[f"{prefix}.w2.weight"] = (hidden, inner)
    generator = torch.Generator().manual_seed(0)
    names = sorted(shapes)
    weight_map = {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        part = names[number::2]
        tensors = {name: torch.randn(shapes[name], generator=generator, dtype=torch.bfloat16) for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.dtype, config.architectures = torch.bfloat16, ["MixtralForCausalLM"]
    config.save_pretrained(folder)


def prepare(folder: Path, scale: float) -> None:
    _write(folder, _config(scale))
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    _write(folder / llama.TINY, _config(0, vocab_size=128, **tiny))


CASES = (
    Case(
        "experts", "16-expert Mixtral, 1.6 GB in bf16, experts fused on load", prepare,
        peers.contenders(torch.bfloat16, ("weightlift", "transformers")),
        target="≥ 2× transformers; peak ≤ 1.1× the model's bytes",
    ),
)  # fmt: skip
