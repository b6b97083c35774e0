"""Tiny models of families of classes that load each other's checkpoints, and what their forward takes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers import initialization as init

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
TEXT = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
IDS = {"input_ids": torch.tensor([[3, 5, 8, 13]])}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8)}


@dataclass(frozen=True)
class Family:
    """``classes`` of models for the same ``config``; the first of them is the one that an Auto class ``auto`` finds."""

    config: Callable[[], Any]
    classes: tuple[Any, ...]
    inputs: dict[str, torch.Tensor]
    auto: Any = None


def _clip() -> Any:
    text = {**TEXT, "max_position_embeddings": 16, "projection_dim": 8}
    return tf.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 8}, projection_dim=8)


def _llava() -> Any:
    return tf.LlavaConfig(
        text_config={"model_type": "llama", **LLAMA},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=39,
    )


class OddConfig(tf.PreTrainedConfig):
    model_type = "odd"

    def __init__(self, width: int = 6, tie_word_embeddings: bool = True, **kwargs: Any) -> None:
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.width = width


class OddNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma.to(x.dtype) + self.beta.to(x.dtype)


class OddBody(tf.PreTrainedModel):
    """A model of somebody's own, with much that is allowed and rare."""

    config_class = OddConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"
    _keep_in_fp32_modules = ("fine",)

    def __init__(self, config: Any, scale: float = 1.0) -> None:
        super().__init__(config)
        width = config.width
        self.embed = nn.Embedding(10, width, padding_idx=0)
        self.norm = OddNorm(width)
        self.again = self.norm
        self.fine = nn.Linear(width, width)
        self.list = nn.ParameterList([nn.Parameter(torch.full((2,), float(i))) for i in range(2)])
        self.temperature = nn.Parameter(torch.tensor(0.5 * scale))
        self.turned = nn.Parameter(torch.arange(float(2 * width)).view(2, width).t())
        self.whole = nn.Parameter(torch.arange(4), requires_grad=False)
        self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.register_buffer("table", torch.linspace(0, 1, width), persistent=False)
        self.register_buffer("mask", torch.eye(3, dtype=torch.bool))
        self.post_init()
        self.embed.weight.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.25)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, OddNorm):
            nn.init.constant_(module.gamma, 3.0)
            nn.init.zeros_(module.beta)
            nn.init.constant_(module.count, 7)
        elif isinstance(module, OddBody):
            nn.init.constant_(module.temperature, 0.125)
            nn.init.constant_(module.frozen, 5.0)
            init.copy_(module.table, torch.linspace(0, 1, self.config.width))

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.norm(self.embed(input_ids)) + self.table.to(self.embed.weight.dtype)
        hidden = self.fine(hidden.to(self.fine.weight.dtype)).to(self.embed.weight.dtype)
        return (hidden * self.temperature,)


class OddModel(tf.PreTrainedModel):
    """It with a tied head."""

    config_class = OddConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"
    _tied_weights_keys = {"head.weight": "body.embed.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"frozen", r"second\.bias"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"ignored"]  # noqa: RUF012
    _init_weights = OddBody._init_weights

    def __init__(self, config: Any, scale: float = 1.0) -> None:
        super().__init__(config)
        self.body = OddBody(config, scale)
        self.head = nn.Linear(config.width, 10, bias=False)
        self.second = nn.Linear(config.width, 2)
        self.post_init()
        self.built_with = scale

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> Any:
        (hidden,) = self.body(input_ids)
        return self.head(hidden), self.second(hidden)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        lambda: tf.LlamaConfig(**LLAMA, tie_word_embeddings=False),
        (tf.LlamaForCausalLM, tf.LlamaModel, tf.LlamaForSequenceClassification),
        IDS,
        tf.AutoModelForCausalLM,
    ),
    "llama tied": Family(
        lambda: tf.LlamaConfig(**LLAMA, tie_word_embeddings=True),
        (tf.LlamaForCausalLM, tf.LlamaModel),
        IDS,
        tf.AutoModelForCausalLM,
    ),
    "bert": Family(
        lambda: tf.BertConfig(**SMALL),
        (tf.BertForMaskedLM, tf.BertModel, tf.BertForSequenceClassification, tf.BertForPreTraining),
        IDS,
        tf.AutoModelForMaskedLM,
    ),
    "gpt2": Family(
        lambda: tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32),
        (tf.GPT2LMHeadModel, tf.GPT2Model),
        IDS,
        tf.AutoModelForCausalLM,
    ),
    "t5": Family(
        lambda: tf.T5Config(**T5, feed_forward_proj="gated-gelu", decoder_start_token_id=0),
        (tf.T5ForConditionalGeneration, tf.T5Model, tf.T5EncoderModel),
        {**IDS, "decoder_input_ids": torch.tensor([[0, 4]])},
        tf.AutoModelForSeq2SeqLM,
    ),
    "bart": Family(
        lambda: tf.BartConfig(**SEQ2SEQ), (tf.BartForConditionalGeneration, tf.BartModel), IDS, tf.AutoModelForSeq2SeqLM
    ),
    "whisper": Family(
        lambda: tf.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=16),
        (tf.WhisperForConditionalGeneration, tf.WhisperModel),
        {"input_features": torch.linspace(-1, 1, 256).view(1, 8, 32), "decoder_input_ids": torch.tensor([[2, 4]])},
        tf.AutoModelForSpeechSeq2Seq,
    ),
    "vit": Family(
        lambda: tf.ViTConfig(**VISION, num_labels=3),
        (tf.ViTForImageClassification, tf.ViTModel),
        PIXELS,
        tf.AutoModelForImageClassification,
    ),
    "resnet": Family(
        lambda: tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3),
        (tf.ResNetForImageClassification, tf.ResNetModel),
        PIXELS,
        tf.AutoModelForImageClassification,
    ),
    "wav2vec2": Family(
        lambda: tf.Wav2Vec2Config(
            **TEXT, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(4, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        ),
        (tf.Wav2Vec2ForCTC, tf.Wav2Vec2Model),
        {"input_values": torch.linspace(-1, 1, 200).view(1, 200)},
        tf.AutoModelForCTC,
    ),
    "clip": Family(_clip, (tf.CLIPModel, tf.CLIPTextModel, tf.CLIPVisionModel), {**IDS, **PIXELS}, tf.AutoModel),
    "llava": Family(_llava, (tf.LlavaForConditionalGeneration,), IDS, tf.AutoModelForImageTextToText),
    "mixtral": Family(
        lambda: tf.MixtralConfig(**LLAMA, num_local_experts=3, tie_word_embeddings=False),
        (tf.MixtralForCausalLM, tf.MixtralModel),
        IDS,
        tf.AutoModelForCausalLM,
    ),
    "deepseek": Family(
        lambda: tf.DeepseekV3Config(
            **LLAMA, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8,
            q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
            first_k_dense_replace=1,
        ),
        (tf.DeepseekV3ForCausalLM,),
        IDS,
        tf.AutoModelForCausalLM,
    ),
    "albert": Family(
        lambda: tf.AlbertConfig(**SMALL, embedding_size=8),
        (tf.AlbertForMaskedLM, tf.AlbertModel),
        IDS,
        tf.AutoModelForMaskedLM,
    ),
    "mamba": Family(
        lambda: tf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4),
        (tf.MambaForCausalLM, tf.MambaModel),
        IDS,
        tf.AutoModelForCausalLM,
    ),
    "encoder-decoder": Family(
        lambda: tf.EncoderDecoderConfig.from_encoder_decoder_configs(
            tf.BertConfig(**SMALL), tf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True),
            decoder_start_token_id=1, pad_token_id=0,
        ),
        (tf.EncoderDecoderModel,),
        {**IDS, "decoder_input_ids": torch.tensor([[0, 4]])},
        tf.AutoModelForSeq2SeqLM,
    ),
    "odd": Family(OddConfig, (OddModel, OddBody), {"input_ids": torch.tensor([[1, 0, 2]])}),
}  # fmt: skip


@functools.cache
def _saved(name: str, at: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The configuration of a class of a family, and the state dict of a model of it, ties repeated."""
    family = FAMILIES[name]
    cls, config = family.classes[at], family.config()
    if not isinstance(config, cls.config_class):  # it is a part of the model that the others are
        config = next(part for part in vars(config).values() if isinstance(part, cls.config_class))
    torch.manual_seed(3)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config, {key: value.detach().clone() for key, value in model.state_dict().items()}


def saved(name: str, at: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The same, for the caller to change."""
    config, state = _saved(name, at)
    return copy.deepcopy(config), dict(state)
