"""A Stable-Diffusion-like pipeline of four components (UNet, VAE, two text encoders), 2 GB in fp16, 4 GB in fp32.

Three ways: in the dtype of the files, which both sides map; fp32 files wanted in bf16, which have to be converted; and
without mapping (``disable_mmap=True``, for network file systems), which has to be read. Diffusers has its parallel
loading on.
"""

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


def prepare(folder: Path, scale: float, *, dtype: torch.dtype = FP16) -> None:
    big = build(width=max(32, round(640 * scale) // 32 * 32), text_width=768, layers=max(1, round(12 * scale)))
    big.to(dtype=dtype).save_pretrained(folder, max_shard_size="200MB")
    build(width=32, text_width=64, layers=1).to(dtype=dtype).save_pretrained(folder / llama.TINY)


def _class() -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline


def _ours(folder: Path, **options: Any) -> Any:
    import weightlift as wl

    return wl.from_pretrained(_class(), folder, **options)


def _theirs(folder: Path, **options: Any) -> Any:
    return _class().from_pretrained(folder, **options)


def _ready(load: Any, options: dict[str, Any], folder: Path) -> Ready:
    os.environ["HF_ENABLE_PARALLEL_LOADING"] = "yes"  # before diffusers is imported
    load(folder / llama.TINY, **options)

    def timed() -> object:
        pipe = load(folder, **options)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                touch(component)
        return pipe

    return timed


def _case(name: str, title: str, made: Any, **options: Any) -> Case:
    contenders = {
        OURS: partial(_ready, _ours, options), "diffusers (parallel loading)": partial(_ready, _theirs, options)
    }  # fmt: skip
    return Case(name, title, made, contenders, target="≥ 1.4× diffusers with parallel loading on")


_FP32 = partial(prepare, dtype=torch.float32)
CASES = (
    _case("pipeline", "pipeline of four components, fp16, mapped", prepare, dtype=FP16),
    _case("pipeline-cast", "the same pipeline, fp32 files wanted in bf16", _FP32, dtype=torch.bfloat16),
    _case("pipeline-read", "the same pipeline, fp16, disable_mmap", prepare, dtype=FP16, disable_mmap=True),
)
