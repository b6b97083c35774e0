"""Tiny models of Transformers, built from a configuration."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from .cases import add

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 128,
}
ROPE = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
IDS = {"input_ids": torch.arange(8).view(1, 8)}
USED = ("models.auto.modeling_auto", "masking_utils", "modeling_rope_utils")


def _config(kind: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **options)


def model(
    name: str, kind: str, options: dict[str, Any], inputs: Any = IDS, auto: str = "AutoModel", **more: Any
) -> None:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, auto).from_config(_config(kind, options))

    add(name, build, __name__, inputs=lambda: dict(inputs), **more)


def preload() -> None:
    """Import what the cases use, once, before the forks."""
    for name in USED:
        importlib.import_module(f"transformers.{name}")
    for kind in ("bert", "gpt2", "llama", "mixtral", "t5", "whisper", "vit"):
        importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


CAUSAL = "AutoModelForCausalLM"
model("bert", "bert", {**SMALL, "max_position_embeddings": 64})
model("bert_masked_lm", "bert", {**SMALL, "max_position_embeddings": 64}, auto="AutoModelForMaskedLM")
model("gpt2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}, auto=CAUSAL)
model("llama", "llama", ROPE, auto=CAUSAL)
model("llama_tied", "llama", {**ROPE, "tie_word_embeddings": True}, auto=CAUSAL)
model(
    "llama_scaled_rope",
    "llama",
    {
        **ROPE,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
)
model("mixtral", "mixtral", {**ROPE, "num_local_experts": 4}, auto=CAUSAL)
model(
    "t5",
    "t5",
    {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
    {**IDS, "decoder_input_ids": torch.arange(4).view(1, 4)},
)
model(
    "whisper",
    "whisper",
    {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 128,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    {"input_features": torch.ones(1, 16, 40) * 0.1, "decoder_input_ids": torch.arange(4).view(1, 4)},
)
VISION = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
model("vit", "vit", VISION, {"pixel_values": torch.ones(1, 3, 32, 32) * 0.1})
model(
    "vit_classifier", "vit", VISION, {"pixel_values": torch.ones(1, 3, 32, 32)}, auto="AutoModelForImageClassification"
)
