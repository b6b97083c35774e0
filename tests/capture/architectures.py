"""Small Transformers models of many architectures, with inputs. Built from configurations, so nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "embedding_size": 32,
    "projection_dim": 32, "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3, "num_layers": 3, "num_decoder_layers": 3,
    "encoder_layers": 2, "decoder_layers": 3, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8,
    "intermediate_size": 64, "d_ff": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "hidden_dim": 64, "ffn_dim": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "n_routed_experts": 4, "vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "image_size": 32,
    "patch_size": 8, "word_embed_proj_dim": 32, "num_mel_bins": 16, "max_source_positions": 20,
    "max_target_positions": 64, "conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "sliding_window": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """``model`` and ``config`` are names in transformers, ``extra`` is for the configuration; ``flags`` compared."""

    model: str
    config: str
    kind: str
    inputs: Callable[[], dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ("hidden_states", "attentions")


def text() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (2, 7))}


def pair() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (2, 7)), "decoder_input_ids": torch.randint(3, 99, (2, 5))}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400)}


def speech() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": torch.randint(3, 99, (2, 5))}


def llava_inputs() -> dict[str, Any]:
    ids = torch.randint(3, 90, (2, 24))
    ids[:, 2:18] = 98
    return {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": ids}


VISION = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 3, "image_size": 32,
          "patch_size": 8, "intermediate_size": 64, "num_attention_heads": 4}  # fmt: skip
TEXT = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "intermediate_size", "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id",
        "eos_token_id")}  # fmt: skip

ROUTED = ("hidden_states", "attentions", "router_logits")
CROSS = ("hidden_states", "attentions", "cross_attentions")

ARCHITECTURES = [
    Architecture("LlamaForCausalLM", "LlamaConfig", "decoder", text),
    Architecture("LlamaModel", "LlamaConfig", "decoder", text),
    Architecture("MistralForCausalLM", "MistralConfig", "decoder", text),
    Architecture("Qwen2ForCausalLM", "Qwen2Config", "decoder", text),
    Architecture("Qwen3ForCausalLM", "Qwen3Config", "decoder", text),
    Architecture("GemmaForCausalLM", "GemmaConfig", "decoder", text),
    Architecture("Gemma2ForCausalLM", "Gemma2Config", "decoder", text),
    Architecture("Phi3ForCausalLM", "Phi3Config", "decoder", text),
    Architecture("GPT2LMHeadModel", "GPT2Config", "decoder", text),
    Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", "decoder", text),
    Architecture("OPTForCausalLM", "OPTConfig", "decoder", text),
    Architecture("OlmoForCausalLM", "OlmoConfig", "decoder", text),
    Architecture("CohereForCausalLM", "CohereConfig", "decoder", text),
    Architecture("StableLmForCausalLM", "StableLmConfig", "decoder", text),
    Architecture("MixtralForCausalLM", "MixtralConfig", "experts", text, {}, ROUTED),
    Architecture("Qwen2MoeForCausalLM", "Qwen2MoeConfig", "experts", text, {}, ROUTED),
    Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig", "experts", text, {}, ROUTED),
    Architecture("OlmoeForCausalLM", "OlmoeConfig", "experts", text, {}, ROUTED),
    Architecture("BertModel", "BertConfig", "encoder", text),
    Architecture("BertForSequenceClassification", "BertConfig", "encoder", text),
    Architecture("RobertaModel", "RobertaConfig", "encoder", text),
    Architecture("DistilBertModel", "DistilBertConfig", "encoder", text),
    Architecture("ElectraModel", "ElectraConfig", "encoder", text),
    Architecture("AlbertModel", "AlbertConfig", "encoder", text),
    Architecture("ModernBertModel", "ModernBertConfig", "encoder", text),
    Architecture("T5ForConditionalGeneration", "T5Config", "encoder-decoder", pair, {}, CROSS),
    Architecture("BartForConditionalGeneration", "BartConfig", "encoder-decoder", pair, {}, CROSS),
    Architecture("PegasusForConditionalGeneration", "PegasusConfig", "encoder-decoder", pair, {}, CROSS),
    Architecture("MarianMTModel", "MarianConfig", "encoder-decoder", pair, {}, CROSS),
    Architecture("ViTModel", "ViTConfig", "vision", image),
    Architecture("DeiTModel", "DeiTConfig", "vision", image),
    Architecture("BeitModel", "BeitConfig", "vision", image),
    Architecture("Dinov2Model", "Dinov2Config", "vision", image),
    Architecture("CLIPVisionModel", "CLIPVisionConfig", "vision", image),
    Architecture("SiglipVisionModel", "SiglipVisionConfig", "vision", image, {"vision_use_head": False}),
    Architecture("Wav2Vec2Model", "Wav2Vec2Config", "audio", sound),
    Architecture("HubertModel", "HubertConfig", "audio", sound),
    Architecture("WhisperForConditionalGeneration", "WhisperConfig", "audio", speech, {}, CROSS),
    Architecture("CLIPTextModel", "CLIPTextConfig", "encoder", text),
    Architecture("LlavaForConditionalGeneration", "LlavaConfig", "multimodal", llava_inputs,
                 {"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT}, "image_token_index": 98,
                  "vision_feature_select_strategy": "default", "vision_feature_layer": -1}),
]  # fmt: skip


def build(case: Architecture) -> nn.Module:
    """The model, small, with random weights, in eval mode and with an attention that returns its weights."""
    import transformers

    config_class = getattr(transformers, case.config)
    known = config_class().to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = config_class(**{**({} if "text_config" in case.extra else sizes), **case.extra})
    config._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, case.model)(config)
    return model.eval()


def expected(case: Architecture, output: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    """What Transformers' own flags returned, under the names that weightlift's capture gives them."""
    found = {}
    for flag in case.flags:
        names = [flag]
        if case.kind == "encoder-decoder" or case.flags == CROSS:
            names = [flag] if flag == "cross_attentions" else [f"encoder_{flag}", f"decoder_{flag}"]
        for name in names:
            value = getattr(output, name)
            assert value, f"{case.model} gave no {name}"
            found[name] = value
    return found
