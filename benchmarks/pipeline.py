"""A Stable-Diffusion-like pipeline of four components (UNet, VAE, two text encoders), fp16 on disk and in memory."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama
from benchmarks.harness import OURS, Case, Ready, touch

FP16 = torch.float16


def build(width: int, text_width: int, layers: int) -> Any:
    """A `StableDiffusionXLPipeline` with random weights and a tokenizer of two words."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    text = CLIPTextConfig(
        hidden_size=text_width, intermediate_size=4 * text_width, num_hidden_layers=layers, projection_dim=text_width,
        num_attention_heads=max(1, text_width // 64), vocab_size=49_408,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(width, 2 * width), layers_per_block=2, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * text_width, transformer_layers_per_block=2,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=text_width + 48,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=2,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text), tokenizer=None,
        tokenizer_2=None, unet=unet, scheduler=EulerDiscreteScheduler(),
    )  # fmt: skip


def prepare(folder: Path, scale: float) -> None:
    big = build(width=max(32, round(640 * scale) // 32 * 32), text_width=768, layers=max(1, round(12 * scale)))
    big.to(dtype=FP16).save_pretrained(folder, max_shard_size="200MB")
    build(width=32, text_width=64, layers=1).to(dtype=FP16).save_pretrained(folder / llama.TINY)


def _class() -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline


def _ours(folder: Path) -> Any:
    import weightlift as wl

    return wl.from_pretrained(_class(), folder, torch_dtype=FP16)


def _theirs(folder: Path) -> Any:
    return _class().from_pretrained(folder, torch_dtype=FP16)


def _ready(load: Any, folder: Path) -> Ready:
    os.environ["HF_ENABLE_PARALLEL_LOADING"] = "yes"  # before diffusers is imported
    load(folder / llama.TINY)

    def timed() -> object:
        pipe = load(folder)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                touch(component)
        return pipe

    return timed


CASES = (
    Case(
        "pipeline", "pipeline of four components, fp16, sharded", prepare,
        {OURS: partial(_ready, _ours), "diffusers, parallel loading": partial(_ready, _theirs)},
        target="≥ 1.4× diffusers with parallel loading on",
    ),
)  # fmt: skip
