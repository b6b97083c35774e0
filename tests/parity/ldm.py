"""State dicts in the layouts of the first latent-diffusion checkpoints: UNets, VAEs, control nets, text encoders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

State = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet(state: Mapping[str, torch.Tensor], config: Mapping[str, Any], prefix: str = "model.diffusion_model.") -> State:
    """A UNet's state dict, of `UNet2DConditionModel` or the part of a control net that is one."""
    layers = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
    if config.get("addition_embed_type") == "text_time":
        layers = {**layers, **DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]}
    return {prefix + (layers.get(name) or _unet_name(name, config)): value for name, value in state.items()}


def _unet_name(name: str, config: Mapping[str, Any]) -> str:
    count = config["layers_per_block"]
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, number, rest = found.groups()
        return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{_resnet(rest)}"
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    assert found is not None, name
    side, block, kind, number, rest = found.groups()
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * (count + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        attends = "CrossAttn" in config["up_block_types"][int(block)]
        return f"output_blocks.{(int(block) + 1) * (count + 1) - 1}.{2 if attends else 1}.{rest}"
    at = int(block) * (count + 1) + int(number) + (side == "down")
    where = "input_blocks" if side == "down" else "output_blocks"
    return f"{where}.{at}.{0 if kind == 'resnets' else 1}.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    for new, old in _RESNET.items():
        rest = re.sub(rf"^{new}\.", f"{old}.", rest)
    return rest


def control_net(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> State:
    """A `ControlNetModel`'s state dict."""
    layers = DIFFUSERS_TO_LDM_MAPPING["controlnet"]["layers"]
    made, rest = {}, {}
    for name, value in state.items():
        kind, _, last = name.rpartition(".")
        if name in layers:
            made[f"control_model.{layers[name]}"] = value
        elif name.startswith("controlnet_down_blocks."):
            made[f"control_model.zero_convs.{kind.rpartition('.')[2]}.0.{last}"] = value
        elif name.startswith("controlnet_mid_block."):
            made[f"control_model.middle_block_out.0.{last}"] = value
        elif name.startswith("controlnet_cond_embedding.blocks."):
            made[f"control_model.input_hint_block.{2 * int(kind.rpartition('.')[2]) + 2}.{last}"] = value
        else:
            rest[name] = value
    return made | unet(rest, config, prefix="control_model.")


def vae(state: Mapping[str, torch.Tensor], config: Mapping[str, Any], prefix: str = "first_stage_model.") -> State:
    """An `AutoencoderKL`'s state dict; the attention's weights as 1×1 convolutions."""
    blocks = len(config["up_block_types"])
    made = {}
    for name, value in state.items():
        key = DIFFUSERS_TO_LDM_MAPPING["vae"].get(name)
        if key is None:
            key = _vae_name(name, blocks)
            if ".mid.attn_1." in key and value.ndim == 2:
                value = value[:, :, None, None]
        made[prefix + key] = value
    return made


def _vae_name(name: str, blocks: int) -> str:
    if found := re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        side, kind, number, rest = found.groups()
        if kind == "attentions":
            inner, _, last = rest.rpartition(".")
            return f"{side}.mid.attn_1.{_VAE_ATTENTION[inner]}.{last}"
        return f"{side}.mid.block_{int(number) + 1}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
    pattern = r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.*)"
    found = re.match(pattern, name)
    assert found is not None, name
    side, block, kind, number, rest = found.groups()
    at = f"encoder.down.{block}" if side == "encoder" else f"decoder.up.{blocks - 1 - int(block)}"
    if kind != "resnets":
        return f"{at}.{kind.removesuffix('rs')}.{rest}"
    return f"{at}.block.{number}.{rest.replace('conv_shortcut', 'nin_shortcut')}"


def clip(state: Mapping[str, torch.Tensor], prefix: str = "cond_stage_model.transformer.") -> State:
    """A CLIP text model's state dict as Transformers once wrote it."""
    return {prefix + _wrapped(name): value for name, value in state.items()}


def _wrapped(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def open_clip(state: Mapping[str, torch.Tensor], prefix: str = "conditioner.embedders.1.model.") -> State:
    """A CLIP text model's state dict as open_clip writes it: joined projections, another orientation of the last."""
    layers = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    blocks = DIFFUSERS_TO_LDM_MAPPING["openclip"]["transformer"]
    made: State = {}
    for name, value in ((_wrapped(name), value) for name, value in state.items()):
        if name in layers:
            made[prefix + layers[name]] = value.T.contiguous() if name.startswith("text_projection") else value
            continue
        if ".k_proj." in name or ".v_proj." in name:
            continue
        key = name
        if ".q_proj." in name:
            value = torch.cat([state_of(state, name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"])
            key = name.replace(".q_proj.weight", ".in_proj_weight").replace(".q_proj.bias", ".in_proj_bias")
        for new, old in blocks.items():
            key = key.replace(new, old)
        made[f"{prefix}transformer.{key}"] = value
    return made


def state_of(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The value of a name, with or without the wrapper that Transformers has dropped."""
    return state[name] if name in state else state[name.removeprefix("text_model.")]
