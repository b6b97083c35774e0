"""Tiny models of every architecture that Transformers knows, by shrinking the sizes of its default configuration.

Sizes are recognised by the names of the configuration's fields; a table of exceptions is kept for what those names
don't tell. Where the shrunk configuration can't be built, groups of sizes are left at their defaults, one after the
other, until it can; where none of that helps, every size by itself is shrunk with which it still can. A trial costs no
memory, as it is built deferred.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.parity.unusual import EXCEPTIONS
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from weightlift.deferred.construct import CurrentLoad
from weightlift.integrations.transformers.init import build

LARGEST = 300_000_000

# Group, field names, value. The first pattern that matches decides.
_SIZES: list[tuple[str, str, int]] = [
    ("vocabulary", r"(^|_)(vocab_size|vocab_size_per_layer_input|n_vocab|codebook_size|semantic_vocab_size)$", 128),
    ("vocabulary", r"^(output_vocab_size|input_vocab_size|audio_vocab_size|tgt_vocab_size|src_vocab_size)$", 128),
    ("positions", r"(max_position_embeddings|n_positions|max_source_positions|max_target_positions)$", 64),
    ("positions", r"^(n_ctx|max_position|seq_length|max_sequence_length|max_seq_len|block_size_max)$", 64),
    ("layers", r"(^|_)(num_)?(hidden_layers|layers|n_layers|n_layer|num_blocks|depth)$", 2),
    ("layers", r"^(first_k_dense_replace)$", 1),
    ("groups", r"(num_key_value_heads|num_kv_heads|n_kv_heads|n_head_kv|num_global_key_value_heads)$", 2),
    ("heads", r"(num_attention_heads|n_heads|n_head|num_heads|attention_heads|num_query_heads|num_.*_heads)$", 4),
    ("heads", r"(^|_)(head_dim|d_kv|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|attention_head_size|qk_head_dim)$", 8),
    ("ranks", r"(q_lora_rank|kv_lora_rank|o_lora_rank)$", 16),
    ("experts", r"(num_local_experts|n_routed_experts|num_experts|moe_num_experts|num_moe_experts)$", 4),
    ("experts", r"(num_experts_per_tok|num_experts_per_token|moe_topk|top_k_experts|moe_k|num_selected_experts)$", 2),
    ("experts", r"^(n_group|topk_group)$", 1),
    ("filters", r"^(num_filters|n_filters|base_channels)$", 8),
    ("hidden", r"(moe_intermediate_size|intermediate_size|ffn_dim|d_ff|dim_feedforward|n_inner|ffn_hidden_size)$", 48),
    ("hidden", r"(encoder_ffn_dim|decoder_ffn_dim|hidden_dim_ffn|mlp_dim|d_inner|intermediate_dim)$", 48),
    ("hidden", r"(^|_)(hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|embedding_size|emb_dim|embedding_dim)$", 32),
    ("projection", r"(projection_dim|proj_dim|output_dim|out_hidden_size|decoder_hidden_size|fusion_hidden_size)$", 32),
    ("image", r"^(image_size|input_size|img_size|crop_size)$", 32),
    ("image", r"^(patch_size)$", 8),
    ("queries", r"^(num_queries|num_query_tokens|num_latents|max_num_queries|query_length)$", 8),
]
_TOKEN = re.compile(r"(token_id|token_index|_id|token_ids)$")
_GROUPS = tuple(dict.fromkeys(group for group, _, _ in _SIZES))
# What is left at its default, in turn; "few" takes four layers for two.
_ATTEMPTS: tuple[tuple[str, ...], ...] = (
    (),
    ("groups",),
    ("few", "groups"),
    ("positions",),
    ("heads", "groups"),
    ("image",),
    ("layers", "groups"),
    ("hidden", "projection"),
    ("hidden", "heads", "groups", "projection"),
    tuple(group for group in _GROUPS if group not in ("vocabulary", "experts")),
)


def _shrunk(config: Any, left: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a configuration that change, sub-configurations included."""
    found: dict[str, Any] = {}
    names = set(getattr(type(config), "__dataclass_fields__", config.__dict__))
    layers = _layers(config)
    few = 4 if "few" in left else 2
    for name, value in list(config.__dict__.items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found[name] = {**_shrunk(value, left), **({"model_type": value.model_type} if value.model_type else {})}
        elif name not in names:
            continue
        elif type(value) is int:
            size = _size(name, value, left)
            if size is not None:
                found[name] = few if size == 2 and re.search(_SIZES[4][1], name) and "few" in left else size
        elif isinstance(value, (list, tuple)) and value:
            items = _shrunk_list(name, list(value), layers, few, left)
            if items is not None:
                found[name] = items
    return found


def _layers(config: Any) -> int | None:
    return next(
        (
            value
            for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")
            if type(value := config.__dict__.get(name)) is int
        ),
        None,
    )


def _size(name: str, value: int, left: tuple[str, ...]) -> int | None:
    for group, pattern, size in _SIZES:
        if group not in left and re.search(pattern, name):
            return min(value, size) if value > 0 else None
    return 99 if _TOKEN.search(name) and value >= 100 else None


def _shrunk_list(name: str, value: list[Any], layers: int | None, few: int, left: tuple[str, ...]) -> list[Any] | None:
    if len(value) == layers and layers > few and "layers" not in left:
        kinds = sorted(range(len(value)), key=lambda i: (value.index(value[i]) != i, i))[: few - 1]
        chosen = sorted({*kinds, len(value) - 1, *range(few)}, key=lambda i: (i not in kinds, i))
        return [value[i] for i in chosen][:few]
    if not all(type(item) is int for item in value):
        return None
    if _TOKEN.search(name):
        return [min(item, 99) for item in value]
    if "depths" in name:
        return [1 for _ in value]
    if "heads" in name and "heads" not in left:
        return [2 for _ in value]
    if re.search(r"hidden_sizes|embed_dims|hidden_dims|widths|dims$", name) and "hidden" not in left:
        return [max(8, item // max(1, max(value) // 32) // 8 * 8) for item in value]
    return None


def _module_of(model_type: str) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    return importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))


@functools.cache
def classes_of(model_type: str) -> tuple[type, ...]:
    """Every model class of a model type: those of its module that name its configuration as theirs; where there are
    none, the classes of another type that the Auto classes take for it."""
    config_class = CONFIG_MAPPING[model_type]
    try:
        module = _module_of(model_type)
    except ModuleNotFoundError:
        return _borrowed(model_type)
    found = tuple(
        cls
        for name, cls in sorted(vars(module).items())
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and cls.config_class is config_class
        and name == cls.__name__
        and name in getattr(module, "__all__", (name,))
        and not name.endswith("PreTrainedModel")
    )
    return found or _borrowed(model_type)


_MAPPINGS = (MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _borrowed(model_type: str) -> tuple[type, ...]:
    names = (
        names
        for mapping in _MAPPINGS
        if (names := mapping.get(model_type)) is not None
    )
    found = [name for item in names for name in ([item] if isinstance(item, str) else item)]
    # The library does not give all of them away: the others are parts of models.
    known = (name for name in dict.fromkeys(found) if "Timm" not in name and hasattr(transformers, name))
    return tuple(getattr(transformers, name) for name in known)


def heads_first(model_type: str) -> tuple[type, ...]:
    """The classes of a model type, those with a head in front."""
    classes = classes_of(model_type)
    return tuple(sorted(classes, key=lambda cls: "For" not in cls.__name__ and "LMHead" not in cls.__name__))


MODEL_TYPES = tuple(sorted(CONFIG_MAPPING_NAMES))
_left_of: dict[str, tuple[str, ...]] = {}


def tiny_config(model_type: str, cls: type) -> Any:
    """A small configuration with which ``cls`` can be built. Raises the first error when there is none."""
    config_class = CONFIG_MAPPING[model_type]
    first: Exception | None = None
    try:
        default = config_class()
    except Exception:
        default = config_class(**_with({}, model_type))
    attempts = _ATTEMPTS if model_type not in _left_of else (_left_of[model_type], *_ATTEMPTS)
    for left in attempts:
        try:
            fields = _shrunk(default, left)
            config = config_class(**_with(fields, model_type))
            numel = _numel(cls, copied(config))
            if numel > LARGEST:
                raise ValueError(f"{numel:,} parameters")
        except ImportError:
            raise
        except Exception as error:
            first = first or error
        else:
            _left_of[model_type] = left
            return config
    assert first is not None
    try:
        return _one_by_one(default, cls, model_type)
    except ImportError:
        raise
    except Exception as error:
        raise error from first


def _with(fields: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The fields with the exceptions of a model type."""
    for name, value in EXCEPTIONS.get(model_type, {}).items():
        *path, last = name.split(".")
        place = fields
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return fields


def _one_by_one(default: Any, cls: type, model_type: str) -> Any:
    """The default configuration with every change that leaves it buildable, tried by halves. Raises the error of the
    default one when that can't be built, and ValueError when the result is too large."""
    whole = _with(default.to_dict(), model_type)
    fixed = {tuple(name.split(".")) for name in EXCEPTIONS.get(model_type, {})}
    kept: list[tuple[tuple[str, ...], Any]] = []

    def made(changes: list[tuple[tuple[str, ...], Any]]) -> tuple[Any, int]:
        fields = copy.deepcopy(whole)
        for path, value in changes:
            place = fields
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
        config = type(default)(**fields)
        return config, _numel(cls, copied(config))

    def add(changes: list[tuple[tuple[str, ...], Any]]) -> None:
        try:
            made(kept + changes)
        except Exception:
            middle = len(changes) // 2
            if middle:
                add(changes[:middle])
                add(changes[middle:])
        else:
            kept.extend(changes)

    made([])
    add([item for item in _flat(_shrunk(default, ())) if item[0] not in fixed and item[0][-1] != "model_type"])
    config, numel = made(kept)
    if numel > LARGEST:
        raise ValueError(f"{numel:,} parameters")
    return config


def _flat(fields: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


def _numel(cls: type, config: Any) -> int:
    load = CurrentLoad(source=None, deferred=True, seed=0)
    model = build(cls, lambda: cls(config), config, torch.float32, load).model
    return sum(parameter.numel() for parameter in model.parameters())


def save_beside(model_type: str, folder: Path) -> None:
    """What a class wants in its folder beside its weights, and does not save."""
    if model_type == "qwen2_5_omni":
        torch.save({}, folder / "spk_dict.pt")  # the voices


def copied(config: Any) -> Any:
    """Another configuration of the same values: constructors change the one that they get."""
    return type(config).from_dict(config.to_dict())


def quiet() -> None:
    """Fewer messages from what is deprecated or unusual in tiny configurations."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
