"""Tiny pipelines, with components of both libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of the alphabet."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ab", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=32,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path) -> Any:
    """UNet, VAE and two text encoders, of which the second projects."""
    text = transformers.CLIPTextConfig(**TEXT, projection_dim=32)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        use_linear_projection=True,
    )  # fmt: skip
    words = tokenizer(folder)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=transformers.CLIPTextModel(text), tokenizer=words, tokenizer_2=words, unet=unet,
        text_encoder_2=transformers.CLIPTextModelWithProjection(text), scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def flux(folder: Path) -> Any:
    """A transformer with joint blocks, and a T5 encoder, which is tied and keeps parts of itself in float32."""
    t5 = transformers.T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=64)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    words = tokenizer(folder)
    return diffusers.FluxPipeline(
        vae=vae(), text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, projection_dim=32)),
        tokenizer=words, text_encoder_2=transformers.T5EncoderModel(t5), tokenizer_2=words, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def stable_diffusion(folder: Path) -> Any:
    """With an image processor and a safety checker, a model class of the pipeline's own module."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {**TEXT, "image_size": 32, "patch_size": 8}
    vision.pop("vocab_size")
    checker = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=32)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
        tokenizer=tokenizer(folder), unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=StableDiffusionSafetyChecker(checker), feature_extractor=transformers.CLIPImageProcessorPil(),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "stable_diffusion_xl": stable_diffusion_xl,
    "flux": flux,
    "stable_diffusion": stable_diffusion,
}


def save(name: str, folder: Path, **options: Any) -> Path:
    """A tiny pipeline in ``folder / name``, its models in several shard files each."""
    torch.manual_seed(3)
    made = PIPELINES[name](folder / f"{name}-words")
    made.save_pretrained(folder / name, max_shard_size="100KB", **options)
    return folder / name
