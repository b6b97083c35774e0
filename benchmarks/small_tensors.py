"""Very many small tensors: mixtures of experts with as many as published ones have, narrow; and many narrow layers.

The counts are those of Qwen3-30B-A3B (18,867 tensors) and DeepSeek-V3 (about 91,000): a tensor an expert and projection
in the files, one for all experts of a layer in the module. In the third case, 2,000 Llama layers, nothing is merged:
most of its time goes into the constructors of 26,000 modules, which are Transformers' and Python's for every loader.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import llama, peers
from benchmarks.harness import Case

BF16 = torch.bfloat16
HIDDEN, INNER = 64, 32


def layers(folder: Path, scale: float, *, count: int) -> None:
    llama.save(folder / llama.TINY, llama.tiny_config(), BF16)
    narrow = llama.tiny_config()
    narrow.num_hidden_layers = max(1, round(count * scale))
    if getattr(narrow, "layer_types", None) is not None:
        narrow.layer_types = [narrow.layer_types[0]] * narrow.num_hidden_layers
    llama.save(folder, narrow, BF16)


def experts(folder: Path, scale: float, *, layers: int, experts: int, files: int) -> None:
    _experts(folder, max(1, round(layers * scale)), experts, files)
    _experts(folder / llama.TINY, 1, 4, 1)


def _experts(folder: Path, layers: int, experts: int, files: int) -> None:
    """A Qwen3-MoE under the names that published checkpoints have."""
    from transformers import Qwen3MoeConfig

    folder.mkdir(parents=True, exist_ok=True)
    config: Any = Qwen3MoeConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, moe_intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=2,
        vocab_size=256, tie_word_embeddings=False, decoder_sparse_step=1,
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (256, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (256, HIDDEN),
    }  # fmt: skip
    for number in range(layers):
        layer = f"model.layers.{number}"
        for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, 64)
        for name in ("q_norm", "k_norm"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (16,)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.mlp.gate.weight"] = (experts, HIDDEN)
        for expert in range(experts):
            prefix = f"{layer}.mlp.experts.{expert}"
            shapes |= {f"{prefix}.{name}.weight": (INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
            shapes[f"{prefix}.down_proj.weight"] = (HIDDEN, INNER)
    names = list(shapes)
    step = -(-len(names) // files)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = names[number * step : (number + 1) * step]
        save_file({name: torch.randn(shapes[name]).to(BF16) for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.dtype, config.architectures = BF16, ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)


CASES = (
    *(
        Case(
            f"tensors-{thousands}k", f"{layers * 393 + 3:,} tensors of 4 kB: {layers} layers of 128 experts",
            partial(experts, layers=layers, experts=128, files=files),
            peers.contenders(BF16, ("weightlift", "transformers")), target="≥ 3× transformers' time per tensor; linear",
        )
        for thousands, layers, files in ((18, 48, 16), (91, 234, 163))
    ),
    Case(
        "layers-18k", "18,003 tensors of 2,000 narrow layers", partial(layers, count=2_000),
        peers.contenders(BF16, ("weightlift", "weightlift.load", "transformers", "accelerate", "safetensors")),
        target="≥ 3× transformers' time per tensor",
    ),
)  # fmt: skip
