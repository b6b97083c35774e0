"""What of Diffusers is not loaded natively, and why: such loads go through its own code, alone in the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from weightlift.integrations.exclusive import NotNative
from weightlift.integrations.not_native import refuse_meta

QUANTISER = "its quantiser replaces modules and makes tensors of its own"
OFFLOAD = "the weights stay in files, behind accelerate's hooks"
REASONS: Mapping[str, str] = {
    "quantization_config": QUANTISER,
    "parallel_config": "its tensors are distributed while they load, or its forward is",
    "use_flashpack": "flashpack reads its own format",
    "offload_state_dict": OFFLOAD,
    "use_onnx": "its components are ONNX sessions",
    "load_connected_pipeline": "it loads further pipelines within",
}
"""Options of ``from_pretrained`` that make a load not native when they are given, and why."""


def refuse(kwargs: Mapping[str, Any]) -> None:
    """Raise `NotNative` for what can be told from the arguments."""
    for name, why in REASONS.items():
        if kwargs.get(name):
            raise NotNative(f"{name}=", why)
    device_map = kwargs.get("device_map")
    refuse_meta(device_map)
    refuse_meta(kwargs.get("device"))
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise NotNative("offloading to disk", OFFLOAD)


class Quantisers:
    """Takes the place of Diffusers' choice of a quantiser: asked for one, the load is not native."""

    def __getattr__(self, name: str) -> NoReturn:
        raise NotNative("a quantised model", QUANTISER)
