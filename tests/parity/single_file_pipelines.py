"""Tiny pipelines as single files, in the layouts of Stable Diffusion, its XL and 3, and Flux."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from tests.parity import diffusers_pipelines, ldm, single_files
from tests.parity.diffusers_pipelines import TEXT, tokenizer, vae

State = dict[str, torch.Tensor]


def _stable_diffusion(folder: Path) -> tuple[Any, State]:
    pipe = diffusers_pipelines.stable_diffusion(folder)
    return pipe, {
        **ldm.unet(pipe.unet.state_dict(), pipe.unet.config),
        **ldm.vae(pipe.vae.state_dict(), pipe.vae.config),
        **ldm.clip(pipe.text_encoder.state_dict()),
    }


def _stable_diffusion_xl(folder: Path) -> tuple[Any, State]:
    pipe = diffusers_pipelines.stable_diffusion_xl(folder)
    # The encoders are told apart by their width.
    wide = transformers.CLIPTextConfig(**{**TEXT, "hidden_size": 48}, projection_dim=48)
    pipe.text_encoder_2 = transformers.CLIPTextModelWithProjection(wide)
    return pipe, {
        **ldm.unet(pipe.unet.state_dict(), pipe.unet.config),
        **ldm.vae(pipe.vae.state_dict(), pipe.vae.config),
        **ldm.clip(pipe.text_encoder.state_dict(), "conditioner.embedders.0.transformer."),
        **ldm.open_clip(pipe.text_encoder_2.state_dict()),
    }


def _transformer(name: str) -> tuple[Any, State]:
    layout = single_files.LAYOUTS[name]
    made = single_files.model(name, layout)
    original = single_files.original(made, name, layout)
    return made, {f"model.diffusion_model.{key}": value for key, value in original.items()}


def _stable_diffusion_3(folder: Path) -> tuple[Any, State]:
    transformer, state = _transformer("SD3Transformer2DModel")
    narrow = transformers.CLIPTextConfig(**TEXT, projection_dim=32)
    wide = transformers.CLIPTextConfig(**{**TEXT, "hidden_size": 48}, projection_dim=48)
    t5 = transformers.T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=64)
    words = tokenizer(folder)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(), tokenizer=words,
        text_encoder=transformers.CLIPTextModelWithProjection(narrow), tokenizer_2=words, tokenizer_3=words,
        text_encoder_2=transformers.CLIPTextModelWithProjection(wide), text_encoder_3=transformers.T5EncoderModel(t5),
    )  # fmt: skip
    pipe.text_encoder.text_projection.weight.data = torch.eye(32)
    third = pipe.text_encoder_3.state_dict()
    third["encoder.embed_tokens.weight"] = third["shared.weight"]
    return pipe, {
        **state,
        **ldm.vae(pipe.vae.state_dict(), pipe.vae.config),
        **ldm.clip(pipe.text_encoder.state_dict(), "text_encoders.clip_l.transformer."),
        **ldm.clip(pipe.text_encoder_2.state_dict(), "text_encoders.clip_g.transformer."),
        **{f"text_encoders.t5xxl.transformer.{key}": value for key, value in third.items()},
    }


def _flux(folder: Path) -> tuple[Any, State]:
    """Its text encoders are not in the file, but beside the configuration."""
    transformer, state = _transformer("FluxTransformer2DModel")
    pipe = diffusers_pipelines.flux(folder)
    pipe.transformer = transformer
    return pipe, {**state, **ldm.vae(pipe.vae.state_dict(), pipe.vae.config, "vae.")}


PIPELINES: dict[str, Callable[[Path], tuple[Any, State]]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
}


def save(name: str, folder: Path) -> tuple[Path, Path]:
    """A tiny pipeline as a file, and a folder of its configuration, without the weights that the file holds."""
    torch.manual_seed(3)
    pipe, state = PIPELINES[name](folder / f"{name}-words")
    configuration, file = folder / f"{name}-configuration", folder / f"{name}.safetensors"
    pipe.save_pretrained(configuration)
    held = ("unet", "transformer", "vae", *(() if name == "FluxPipeline" else ("text_encoder",)))
    for weights in configuration.rglob("*.safetensors"):
        if weights.parent.name.startswith(held):
            weights.unlink()
    save_file({key: value.contiguous().clone() for key, value in state.items()}, file)
    return file, configuration
