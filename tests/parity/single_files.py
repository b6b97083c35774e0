"""Tiny single-file checkpoints of every class that Diffusers loads from such files, in their publishers' layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import save_file
from tests.parity import diffusers_tiny, ldm
from tests.parity.originals import original_state_dict

CLASSES = tuple(SINGLE_FILE_LOADABLE_CLASSES)


@dataclass(frozen=True)
class Layout:
    """How to make an original of a class.

    ``arguments`` of its constructor, beside those of its tiny one; the others are `original_state_dict`'s, the seeds a
    function of the configuration. ``write``: a function of state dict and configuration instead of a search.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    seeds: Callable[[Any], list[str]] = lambda config: []
    pairs: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[str, ...] = ()
    write: Callable[..., dict[str, torch.Tensor]] | None = None


_FLUX = ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"]
_GUIDANCE = "distilled_guidance_layer.layers.{}.in_layer.bias"
_BLOCKS = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip
_TEXT_TIME = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
}  # fmt: skip
_VAE = {
    "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4,
}  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    "UNet2DConditionModel": Layout(
        {**_BLOCKS, **_TEXT_TIME, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 8},
        write=ldm.unet,
    ),
    "ControlNetModel": Layout({**_BLOCKS, "conditioning_embedding_out_channels": (16, 32)}, write=ldm.control_net),
    "AutoencoderKL": Layout(_VAE, write=ldm.vae),
    "SD3Transformer2DModel": Layout(
        {"qk_norm": "rms_norm", "num_layers": 2, "dual_attention_layers": (0,)},
        lambda config: [
            "joint_blocks.1.x_block.attn.qkv.weight", "joint_blocks.0.x_block.attn.ln_q.weight",
            "joint_blocks.0.x_block.attn2.qkv.weight",
        ],
    ),
    # The sizes of single blocks are written down in the conversions (3,072 and 768): without such blocks here.
    "FluxTransformer2DModel": Layout({"num_single_layers": 0}, lambda config: _FLUX),
    "ChromaTransformer2DModel": Layout(
        {"num_single_layers": 0}, lambda config: [*_FLUX, _GUIDANCE.format(config["approximator_layers"] - 1)]
    ),
    "Lumina2Transformer2DModel": Layout({"num_layers": 0, "num_refiner_layers": 0}),
    "MochiTransformer3DModel": Layout(
        {"num_layers": 48, "num_attention_heads": 2, "attention_head_dim": 8, "pooled_projection_dim": 16,
         "text_embed_dim": 16, "time_embed_dim": 16},
    ),
    "AutoencoderKLLTXVideo": Layout(
        seeds=lambda config: ["vae.encoder.conv_out.conv.weight"], prefixes=("vae.",)
    ),
    "AutoencoderKLLTX2Video": Layout(prefixes=("vae.",)),
    "AutoencoderKLLTX2Audio": Layout(prefixes=("audio_vae.",)),
    "AuraFlowTransformer2DModel": Layout(
        seeds=lambda config: [
            *(f"double_layers.{layer}.attn.w2q.weight" for layer in range(config["num_mmdit_layers"])),
            *(f"single_layers.{layer}.attn.w1q.weight" for layer in range(config["num_single_dit_layers"])),
        ]
    ),
    "SanaTransformer2DModel": Layout(
        seeds=lambda config: [f"blocks.{config['num_layers'] - 1}.attn.qkv.weight"]
    ),
    "Flux2Transformer2DModel": Layout(
        pairs=(
            ("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks"),
            *(("img_attn.qkv.weight", f"attn.to_{part}.weight") for part in "qkv"),
            *(("txt_attn.qkv.weight", f"attn.add_{part}_proj.weight") for part in "qkv"),
            *((f"{old}_norm.scale", f"{new}.weight") for old, new in (
                ("img_attn.norm.query", "attn.norm_q"), ("img_attn.norm.key", "attn.norm_k"),
                ("txt_attn.norm.query", "attn.norm_added_q"), ("txt_attn.norm.key", "attn.norm_added_k"),
                ("norm.query", "attn.norm_q"), ("norm.key", "attn.norm_k"),
            )),
        ),
    ),
    "WanTransformer3DModel": Layout(prefixes=("model.diffusion_model.",)),
}  # fmt: skip

# At the size that the conversions have written down.
WIDE: dict[str, Layout] = {
    "FluxTransformer2DModel": Layout(
        {"num_layers": 0, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128,
         "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (16, 56, 56)},
        lambda config: _FLUX,
    ),
    "ChromaTransformer2DModel": Layout(
        {"num_layers": 0, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128,
         "axes_dims_rope": (16, 56, 56)},
        lambda config: [*_FLUX, _GUIDANCE.format(config["approximator_layers"] - 1)],
    ),
    "HunyuanVideoTransformer3DModel": Layout(
        {"num_layers": 0, "num_single_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 24,
         "attention_head_dim": 128, "text_embed_dim": 32, "pooled_projection_dim": 32},
        pairs=(
            *((f".linear1.{kind}", f".attn.to_{part}.{kind}") for part in "qkv" for kind in ("weight", "bias")),
            *((f".linear1.{kind}", f".proj_mlp.{kind}") for kind in ("weight", "bias")),
        ),
    ),
    "Lumina2Transformer2DModel": Layout(
        {"num_layers": 1, "num_refiner_layers": 0, "hidden_size": 2304, "num_attention_heads": 24, "num_kv_heads": 8,
         "multiple_of": 16, "axes_dim_rope": (32, 32, 32), "cap_feat_dim": 32},
        pairs=tuple(("qkv", f"to_{part}") for part in "qkv"),
    ),
}  # fmt: skip


def model(name: str, layout: Layout, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of a class. Raises what its constructor raises where none can be made."""
    cls = getattr(diffusers, name)
    torch.manual_seed(5)
    return cls(**{**diffusers_tiny.tiny_arguments(name), **layout.arguments}).to(dtype)


def original(made: Any, name: str, layout: Layout) -> dict[str, torch.Tensor]:
    """The state dict of a model in its original layout."""
    state, config = made.state_dict(), dict(made.config)
    if layout.write is not None:
        return layout.write(state, config)
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    return original_state_dict(
        state, convert, config, seeds=layout.seeds(config), pairs=layout.pairs, prefixes=layout.prefixes
    )


def save(made: Any, name: str, folder: Path, layout: Layout) -> Path:
    """An original of a model as a file, beside a folder that holds its configuration. Returns the file."""
    made.save_config(folder / "configuration")
    file = folder / "original.safetensors"
    save_file({key: value.contiguous().clone() for key, value in original(made, name, layout).items()}, file)
    return file
