"""Very small pipelines of many kinds, saved once, and what may have become of their folders on somebody's disk."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as tf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tests.parity.altered import altered
from tests.parity.diffusers_pipelines import tokenizer

BLOCKS: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60,
    "projection_dim": 16, "max_position_embeddings": 16, "bos_token_id": 53, "eos_token_id": 54,
}  # fmt: skip
T5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 60}
CONDITIONED: dict[str, Any] = {
    **BLOCKS, "attention_head_dim": 4, "cross_attention_dim": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip


def _unet(**more: Any) -> Any:
    up = ("CrossAttnUpBlock2D", "UpBlock2D")
    return diffusers.UNet2DConditionModel(**{**CONDITIONED, "sample_size": 8, "up_block_types": up, **more})


def _vae() -> Any:
    return diffusers.AutoencoderKL(
        **BLOCKS, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, sample_size=16,
    )  # fmt: skip


def _text(cls: Any = tf.CLIPTextModel) -> Any:
    return cls(tf.CLIPTextConfig(**TEXT))


def _stable_diffusion(folder: Path) -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {key: value for key, value in TEXT.items() if key not in ("vocab_size", "max_position_embeddings")}
    config = tf.CLIPConfig(
        text_config=TEXT, vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=16
    )
    return diffusers.StableDiffusionPipeline(
        vae=_vae(), text_encoder=_text(), tokenizer=tokenizer(folder), unet=_unet(),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True), safety_checker=StableDiffusionSafetyChecker(config),
        feature_extractor=tf.CLIPImageProcessorPil(),
    )  # fmt: skip


def _without_checker(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=_vae(), text_encoder=_text(), tokenizer=tokenizer(folder), unet=_unet(), safety_checker=None,
        scheduler=diffusers.DDIMScheduler(), feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _controlled(folder: Path) -> Any:
    nets = [diffusers.ControlNetModel(**CONDITIONED, conditioning_embedding_out_channels=(8, 8)) for _ in range(2)]
    return diffusers.StableDiffusionControlNetPipeline(
        vae=_vae(), text_encoder=_text(), tokenizer=tokenizer(folder), unet=_unet(), controlnet=nets,
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _xl(folder: Path) -> Any:
    words = tokenizer(folder)
    unet = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        cross_attention_dim=32,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_text(), tokenizer=words, tokenizer_2=words, unet=unet,
        text_encoder_2=_text(tf.CLIPTextModelWithProjection), scheduler=diffusers.EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip


def _flux(folder: Path) -> Any:
    words = tokenizer(folder)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        vae=_vae(), text_encoder=_text(), tokenizer=words, text_encoder_2=tf.T5EncoderModel(tf.T5Config(**T5)),
        tokenizer_2=words, transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def _wan(folder: Path) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=8,
        ffn_dim=16, num_layers=1,
    )  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=tokenizer(folder), text_encoder=tf.UMT5EncoderModel(tf.UMT5Config(**T5)), vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer, boundary_ratio=0.5,
    )  # fmt: skip


def _unconditional(folder: Path) -> Any:
    unet = diffusers.UNet2DModel(
        **BLOCKS, sample_size=8, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


def _of_classes(folder: Path) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, in_channels=4, norm_num_groups=2
    )
    return diffusers.DiTPipeline(transformer, _vae(), diffusers.DDIMScheduler())


class Nested(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """A pipeline of somebody's own, a component of which is a pipeline."""

    _optional_components = ["further"]  # noqa: RUF012

    def __init__(self, vae: Any, inner: Any, scheduler: Any, further: Any = None, strength: float = 0.5) -> None:
        super().__init__()
        self.register_modules(vae=vae, inner=inner, scheduler=scheduler, further=further)
        self.register_to_config(strength=strength)
        self.vae.requires_grad_(False)
        self.vae.train()


def _nested(folder: Path) -> Any:
    return Nested(_vae(), _of_classes(folder), diffusers.DDIMScheduler())


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "stable diffusion": _stable_diffusion,
    "without checker": _without_checker,
    "controlled": _controlled,
    "xl": _xl,
    "flux": _flux,
    "wan": _wan,
    "unconditional": _unconditional,
    "of classes": _of_classes,
    "nested": _nested,
}


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def saved(name: str) -> Path:
    """The folder of a pipeline, which is nobody's to change."""
    torch.manual_seed(3)
    folder = _folder() / name.replace(" ", "-")
    PIPELINES[name](folder / "words").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def parts_of(folder: Path) -> list[str]:
    """The components that have weights."""
    return sorted(item.name for item in folder.iterdir() if item.is_dir() and any(item.glob("*.safetensors")))


# -- what becomes of a component --------------------------------------------------------------------------------------


def changed(folder: Path, part: str, how: str, number: int, size: int) -> None:
    """One component in other files, or with other tensors in them."""
    files = sorted((folder / part).glob("*.safetensors"))
    if len(files) != 1:
        return  # it was changed before
    try:
        file, state = files[0], load_file(files[0])
    except SafetensorError:
        return  # it was truncated
    if how in ("sharded", "bin", "fp16", "fp16 too", "fp16 bin", "fp16 sharded"):
        if "too" not in how:
            file.unlink()
        _write(state, file, how)
    elif how == "subfolder gone":
        shutil.rmtree(folder / part)
    elif how == "no config":
        (folder / part / "config.json").unlink(missing_ok=True)
    elif how == "no weights":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-3])
    elif how == "another file":
        (folder / part / "notes.txt").write_text("")
    elif how == "a file without a dot":
        (folder / part / "LICENSE").write_text("")
    else:
        save_file(
            {key: value.contiguous() for key, value in altered(state, [(how, number, size)], "model").items()},
            file, {"format": "pt"},
        )  # fmt: skip


def _write(state: dict[str, torch.Tensor], file: Path, how: str) -> None:
    stem = file.name.removesuffix(".safetensors")
    mark = ".fp16" if "fp16" in how else ""
    if mark:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    if "sharded" in how:
        names = [f"{stem}{mark}-0000{at}-of-00002.safetensors" for at in (1, 2)]
        files = {key: names[at % 2] for at, key in enumerate(state)}
        for name in names:
            part = {key: value for key, value in state.items() if files[key] == name}
            save_file(part, file.parent / name, {"format": "pt"})
        index = f"{stem}.safetensors.index{mark}.json"
        (file.parent / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    elif "bin" in how:
        stem = "pytorch_model" if stem == "model" else stem
        torch.save(state, file.parent / f"{stem}{mark}.bin")
    else:
        save_file(state, file.parent / f"{stem}{mark}.safetensors", {"format": "pt"})


OWN = """
from {library} import {name}

class Mine({name}):
    own = "mine"
"""
CALLING_SUPER = """
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        made = super().from_pretrained(*args, **kwargs)
        made.touched = True
        return made
"""


def reindexed(folder: Path, how: str, number: int) -> None:
    """Another ``model_index.json``."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    names = [key for key, value in index.items() if isinstance(value, list)]
    name = names[number % len(names)]
    if how == "nulled":
        index[name] = [None, None]
    elif how == "dropped":
        del index[name]
    elif how == "added":
        index["further"] = index[name]
    elif how == "no such class":
        index[name] = [index[name][0], "Nonsense"]
    elif how == "no such library":
        index[name] = ["nonsense", index[name][1]]
    elif how == "other scheduler":
        index["scheduler"] = ["diffusers", ("DDIMScheduler", "HeunDiscreteScheduler", "UNet2DModel")[number % 3]]
    elif how == "unknown setting":
        index["unknown"] = 3
    elif how == "no class name":
        index.pop("_class_name", None)
    elif how == "other class":
        index["_class_name"] = ("StableDiffusionImg2ImgPipeline", "KandinskyCombinedPipeline", "Nonsense")[number % 3]
    elif how in ("own", "own calling super") and index[name][0] in ("diffusers", "transformers"):
        _own_code(folder / name, index, name, how)
    file.write_text(json.dumps(index))


def _own_code(place: Path, index: dict[str, Any], name: str, how: str) -> None:
    """The component's class is one of a file beside its weights."""
    if place.exists():
        code = OWN.format(library=index[name][0], name=index[name][1])
        (place / "own_code.py").write_text(code + CALLING_SUPER * ("super" in how))
        index[name] = ["own_code", "Mine"]
