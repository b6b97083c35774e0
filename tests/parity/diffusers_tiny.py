"""Tiny models of every class that Diffusers exports, by shrinking the arguments of its constructor one after the other.

A step is kept if the model can still be built and has fewer parameters; trials cost no memory, as they are built
deferred. Few classes need arguments that can't be found so.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from weightlift.deferred.construct import CurrentLoad, construct

LARGEST = 30_000_000
SMALL = 1_500_000

_REQUIRED: dict[str, dict[str, Any]] = {
    "AudioLDM2ProjectionModel": {"text_encoder_dim": 8, "text_encoder_1_dim": 8, "langauge_model_dim": 16},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 32, "block_out_channels": (64, 64),
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 32,
    },
    # Plain attributes of the old weight norm are computed at once: many trials would take their time.
    "AutoencoderKLMiniMaxH3Audio": {"encoder_dim": 8, "latent_dim": 32, "latent_channels": 8, "num_attention_heads": 2,
                                    "decoder_dim": 128, "encoder_rates": (2, 4), "decoder_rates": (4, 2),
                                    "decoder_kernel_sizes": (8, 4), "resblock_kernel_sizes": (3,),
                                    "resblock_dilation_sizes": ((1, 3),)},
    "Cosmos3AVAEAudioTokenizer": {"dec_dim": 8, "dec_c_mults": (1, 2), "dec_strides": (2, 4), "enc_dim": 16,
                                  "enc_intermediate_dim": 32, "enc_num_layers": 1, "enc_num_blocks": 1,
                                  "enc_latent_dim": 16, "vocoder_input_dim": 8, "enc_c_mults": (1, 2),
                                  "enc_strides": (2, 4)},
    "MMAudioVocoder": {"num_mels": 8, "upsample_initial_channel": 64, "upsample_rates": (4, 2),
                       "upsample_kernel_sizes": (8, 4), "resblock_kernel_sizes": (3,),
                       "resblock_dilation_sizes": ((1, 3),)},
    "MiniMaxMusic3Vocoder": {"latent_channels": 8, "decoder_input_dim": 16, "decoder_hidden_dim": 32,
                             "upsampling_ratios": (4, 2)},
    "AutoencoderOobleck": {"encoder_hidden_size": 12, "decoder_channels": 12, "decoder_input_channels": 8,
                           "downsampling_ratios": [2, 4], "channel_multiples": [1, 2]},
    "ControlNetUnionModel": {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                             "projection_class_embeddings_input_dim": 32, "num_trans_channel": 32,
                             "num_proj_channel": 32, "num_trans_head": 2, "block_out_channels": (32, 64),
                             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32,
                             "attention_head_dim": 4, "conditioning_embedding_out_channels": (16, 32)},
    "UniDiffuserTextDecoder": {
        "prefix_length": 4, "prefix_inner_dim": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128,
    },
    "Transformer2DModel": {"in_channels": 32, "num_attention_heads": 2, "attention_head_dim": 16},
    "DreamLiteTransformer2DModel": {"in_channels": 32, "num_attention_heads": 2, "attention_head_dim": 16},
    "DualTransformer2DModel": {"in_channels": 32, "num_attention_heads": 2, "attention_head_dim": 16},
    "TransformerTemporalModel": {"in_channels": 32, "num_attention_heads": 2, "attention_head_dim": 16},
    "LatteTransformer3DModel": {"in_channels": 4, "patch_size": 2, "cross_attention_dim": 32, "caption_channels": 16,
                                "num_attention_heads": 2, "attention_head_dim": 16, "norm_type": "ada_norm_single"},
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2},
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2},
    "HunyuanDiT2DControlNetModel": {"in_channels": 4, "patch_size": 2, "transformer_num_layers": 4},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": [32, 16], "llama_layers": [0, 1]},
    "LongCatAudioDiTVae": {"c_mults": [1, 2], "strides": [2, 2], "channels": 16, "latent_dim": 8,
                           "encoder_latent_dim": 16, "downsampling_ratio": 4},
    "JoyImageEditPlusTransformer3DModel": {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 1,
                                           "text_dim": 32, "rope_dim_list": [8, 12, 12]},
    "JoyImageEditTransformer3DModel": {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 1, "text_dim": 32,
                                       "rope_dim_list": [8, 12, 12]},
    "Kandinsky3UNet": {"time_embedding_dim": 32, "groups": 4, "attention_head_dim": 4, "layers_per_block": 1,
                       "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "encoder_hid_dim": 32},
    "LuminaNextDiT2DModel": {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2,
                             "cross_attention_dim": 32, "multiple_of": 16},
    "OmniGenTransformer2DModel": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64, "num_layers": 1,
        "vocab_size": 128, "pad_token_id": 0, "max_position_embeddings": 64, "original_max_position_embeddings": 32,
        "pos_embed_max_size": 16, "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    },
    "PRXTransformer2DModel": {"hidden_size": 64, "num_heads": 2, "depth": 1, "context_in_dim": 32,
                              "axes_dim": [16, 16]},
    "SanaWMTransformer3DModel": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "linear_head_dim": 16,
                                 "caption_channels": 32, "in_channels": 8, "chunk_plucker_post_attn_blocks": 1},
    "StableAudioProjectionModel": {"text_encoder_dim": 16, "conditioning_dim": 16, "min_value": 0, "max_value": 10},
    "UniDiffuserModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_size": 16, "text_dim": 32,
                         "clip_img_dim": 32, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
                         "use_patch_pos_embed": True, "ff_final_dropout": True},
    "WanAnimate2Transformer3DModel": {"dim": 64, "num_heads": 4, "num_layers": 1, "ffn_dim": 64, "text_dim": 32,
                                      "freq_dim": 32, "in_dim": 8, "out_dim": 4},
    "ZImageTransformer2DModel": {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
                                 "cap_feat_dim": 32, "axes_dims": [8, 12, 12], "axes_lens": [16, 16, 16]},
    "ZImageControlNetModel": {"dim": 64, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "control_in_dim": 16,
                              "control_layers_places": [0], "control_refiner_layers_places": [0],
                              "add_control_noise_refiner": "control_noise_refiner"},
    "RFD4ProteinaAutoencoder": {"atom37_mask": [[1.0] * 37] * 147, "allowed_residue_types": [True] * 147,
                                "nlayers": 1, "token_dim": 32, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 16},
}  # fmt: skip
_MULTI = ("MultiAdapter", "MultiControlNetModel", "FluxMultiControlNetModel", "HunyuanDiT2DMultiControlNetModel",
          "QwenImageMultiControlNetModel", "SD3MultiControlNetModel", "MultiControlNetUnionModel")  # fmt: skip


def _classes() -> tuple[str, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = []
        for name in dir(diffusers):
            try:
                cls = getattr(diffusers, name)
            except Exception:
                continue
            if inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin) and cls is not diffusers.ModelMixin:
                found.append(name)
    return tuple(name for name in sorted(found) if name not in _MULTI)


CLASSES = _classes()


@functools.cache
def tiny_arguments(name: str) -> dict[str, Any]:
    """Arguments with which the class can be built small. Raises the error of its defaults when there are none."""
    cls = getattr(diffusers, name)
    arguments = dict(_REQUIRED.get(name, {}))
    size = numel(cls, arguments)
    for step in _steps(cls, arguments):
        if size <= SMALL:
            break
        trial = {**arguments, **step}
        try:
            smaller = numel(cls, trial)
        except Exception:
            continue
        if smaller < size:
            arguments, size = trial, smaller
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters with {arguments}")
    return arguments


def numel(cls: Any, arguments: dict[str, Any]) -> int:
    """Parameters of a model that is not allocated."""
    load = CurrentLoad(source=None, deferred=True, seed=0)
    inventory, _ = construct(lambda: cls(**arguments), load, default_dtype=torch.float32)
    return sum(parameter.numel() for parameter in inventory.module.parameters())


def _steps(cls: Any, fixed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Changes to try, the most effective first."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name not in fixed and parameter.default not in (inspect.Parameter.empty, None)
    }
    ints = {name: value for name, value in defaults.items() if type(value) is int}
    layers = [name for name in ints if re.search(r"layers|blocks|depth|nlayers", name)]
    yield {name: 2 if ints[name] > 2 else ints[name] for name in layers}
    for name in layers:
        yield {name: 1}
        yield {name: 2}
    for name, value in defaults.items():
        if re.search(r"layers_per|num_blocks|depths", name) and isinstance(value, (list, tuple)):
            yield {name: type(value)(1 for _ in value)}
    heads = [name for name in ints if re.search(r"heads$|_heads_|nheads", name)]
    yield dict.fromkeys(heads, 2)
    for name in heads:
        yield {name: 2}
        yield {name: 4}
    channels = {
        name: value
        for name, value in defaults.items()
        if isinstance(value, (list, tuple)) and value and all(type(item) is int and item >= 16 for item in value)
        and max(value) >= 64
    }  # fmt: skip
    for divisor in (16, 8, 4, 2):
        yield {
            name: type(value)(max(32, item // divisor // 32 * 32) for item in value) for name, value in channels.items()
        }
        for name, value in channels.items():
            yield {name: type(value)(max(32, item // divisor // 32 * 32) for item in value)}
    # Sizes of one value belong together more often than not.
    wide = {name: value for name, value in ints.items() if value >= 64 and name not in heads}
    for width in (32, 64, 128):
        for value in sorted(set(wide.values()), reverse=True):
            together = [name for name in wide if wide[name] == value]
            if value > width:
                yield dict.fromkeys(together, width)
                for name in together:
                    yield {name: width}
        inner = [name for name in wide if re.search(r"(hidden|model|inner|token)_(size|dim)$|^dim$", name)]
        yield dict.fromkeys(inner, width)


def quiet() -> None:
    """Fewer messages from what is deprecated or unusual."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
