"""Loading one saved model of Diffusers both ways, and what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.parity.compare import differences, native_only, settings

import weightlift as wl
from weightlift.integrations.diffusers.model import ORIGINAL
from weightlift.integrations.diffusers.pipeline import ORIGINAL as PIPELINE_ORIGINAL


def both(cls: Any, folder: Path, **options: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(model, loading info) by weightlift, and by Diffusers."""
    theirs = ORIGINAL.__func__(cls, folder, output_loading_info=True, **options)
    with native_only():
        ours = wl.from_pretrained(cls, folder, output_loading_info=True, **options)
    return ours, theirs


def both_pipelines(cls: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    """A pipeline by weightlift, and by Diffusers."""
    theirs = PIPELINE_ORIGINAL.__func__(cls, folder, **options)
    with native_only():
        ours = wl.from_pretrained(cls, folder, **options)
    return ours, theirs


def same_info(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """The loading infos, of which Diffusers gives the lists in no order."""
    return all(sorted(map(str, ours[name])) == sorted(map(str, theirs[name])) for name in theirs) and set(ours) == set(
        theirs
    )


def pipeline_differences(ours: Any, theirs: Any) -> list[str]:
    """What differs between two pipelines: classes, configuration, every component."""
    found = [] if type(ours) is type(theirs) else [f"a {type(ours).__name__} for a {type(theirs).__name__}"]
    if ours._internal_dict != theirs._internal_dict or dict(ours.config) != dict(theirs.config):
        found.append(f"internal dict: {ours._internal_dict} for {theirs._internal_dict}")
    if list(ours.components) != list(theirs.components):
        found.append(f"components: {list(ours.components)} for {list(theirs.components)}")
    for name, theirs_part in theirs.components.items():
        part = ours.components[name]
        if type(part) is not type(theirs_part):
            found.append(f"{name}: a {type(part).__name__} for a {type(theirs_part).__name__}")
        elif isinstance(part, torch.nn.Module):
            found += [f"{name}: {item}" for item in differences(part, theirs_part)]
        elif hasattr(part, "get_vocab"):
            if part.get_vocab() != theirs_part.get_vocab() or part.init_kwargs != theirs_part.init_kwargs:
                found.append(f"{name}: tokenizer")
        elif hasattr(part, "config"):
            found += [f"{name}: {item}" for item in settings(part, theirs_part)]
        elif hasattr(part, "to_dict") and part.to_dict() != theirs_part.to_dict():
            found.append(f"{name}: settings")
    for name in ("hf_device_map", "device", "dtype", "name_or_path"):
        if getattr(ours, name, None) != getattr(theirs, name, None):
            found.append(f"{name}: {getattr(ours, name, None)} for {getattr(theirs, name, None)}")
    return found
