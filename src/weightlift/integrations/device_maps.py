"""What is told from a ``device_map`` alone, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightlift.integrations.exclusive import NotNative


def refuse_meta(places: Any) -> None:
    """Raise `NotNative` for a ``device_map``, or a device, that leaves something on the meta device: nothing is read
    for that, and a model without values is not what is planned here."""
    values = places.values() if isinstance(places, Mapping) else (places,)
    if any(str(value).partition(":")[0] == "meta" for value in values):
        raise NotNative("the meta device", "the model is to have no values there")


def require_names(device_map: Any) -> None:
    """Raise TypeError for a mapping with keys that are no names of modules."""
    others = [key for key in device_map if not isinstance(key, str)] if isinstance(device_map, Mapping) else []
    if others:
        found = ", ".join(f"{key!r} (a {type(key).__name__})" for key in others)
        raise TypeError(
            f"device_map: expected names of modules as keys, found {found}; map names to devices, as in "
            '{"": 0} for the whole model or {"model.layers.0": "cpu", …} for its parts'
        )
