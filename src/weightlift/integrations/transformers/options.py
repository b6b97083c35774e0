"""What is not loaded natively, and why: such loads go through Transformers' own code, alone in the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import monkey_patching
from transformers.distributed.checkpoint import get_distributed_checkpoint_dir
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from weightlift.integrations.exclusive import NotNative
from weightlift.integrations.not_native import refuse_meta, require_names

_PARALLEL = "its tensors are distributed while they load"
_KERNELS = "kernels of others replace classes of the process"
REASONS: Mapping[str, str] = {
    "gguf_file": "the format holds quantised blocks, which Transformers decodes",
    "quantization_config": "its quantiser replaces modules and makes tensors of its own",
    "tp_plan": _PARALLEL,
    "tp_size": _PARALLEL,
    "device_mesh": _PARALLEL,
    "distributed_config": _PARALLEL,
    "use_kernels": _KERNELS,
    "kernel_config": _KERNELS,
    "allow_all_kernels": _KERNELS,
    "fusion_config": "it registers replacements of classes of the process",
}
"""Options of ``from_pretrained`` that make a load not native when they are given, and why."""


def refuse(name: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise `NotNative` for what can be told from the arguments and the process, and TypeError for a ``device_map``
    that Transformers would fail on."""
    require_names(kwargs.get("device_map"))
    refuse_meta(kwargs.get("device_map"))
    where = (kwargs.get("subfolder") or "", kwargs.get("gguf_file"), kwargs.get("state_dict"))
    if get_distributed_checkpoint_dir(name, *where) is not None:
        raise NotNative("a distributed checkpoint", "torch.distributed reads it")
    for option, why in REASONS.items():
        if kwargs.get(option):
            raise NotNative(f"{option}=", why)
    implementation = kwargs.get("attn_implementation")
    if isinstance(implementation, str) and "/" in implementation:
        raise NotNative("attn_implementation from the hub", _KERNELS)
    if is_deepspeed_zero3_enabled():
        raise NotNative("DeepSpeed ZeRO-3", _PARALLEL)
    if monkey_patching.get_patch_mapping():
        raise NotNative("registered class replacements", "Transformers swaps these classes while it builds")


def refuse_fusion(cls: Any, config: Any, fusion_config: Any = None) -> None:
    """In place of Transformers' ``register_fusion_patches``: a configuration may ask for it, too."""
    if fusion_config:
        raise NotNative("fusion_config", REASONS["fusion_config"])
