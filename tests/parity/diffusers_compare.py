"""Loading one saved model of Diffusers both ways, and what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.parity.compare import _equal, _ties, named, native_only

import weightlift as wl
from weightlift.integrations.diffusers_model import ORIGINAL
from weightlift.integrations.diffusers_pipeline import ORIGINAL as PIPELINE_ORIGINAL

WHAT = ("dtype", "shape", "requires_grad", "device", "is_leaf")


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


def differences(ours: Any, theirs: Any) -> list[str]:
    """What differs between two models: names, values, dtypes, devices, ties, flags, configuration."""
    mine, other = named(ours), named(theirs)
    found = [f"only one has {name}" for name in sorted(set(mine) ^ set(other))]
    if list(mine) != list(other):
        found.append("order of names")
    if type(ours) is not type(theirs):
        found.append(f"a {type(ours).__name__} for a {type(theirs).__name__}")
    for name in mine.keys() & other.keys():
        a, b = mine[name], other[name]
        found += [
            f"{name}: {what} {getattr(a, what)} for {getattr(b, what)}"
            for what in WHAT
            if getattr(a, what) != getattr(b, what)
        ]
        if type(a) is not type(b):
            found.append(f"{name}: a {type(a).__name__} for a {type(b).__name__}")
        if a.dtype == b.dtype and a.shape == b.shape and not b.is_meta and not _equal(a, b):
            found.append(f"{name}: values")
        if a.stride() != b.stride() and a.numel():
            found.append(f"{name}: strides")
    if _ties(mine) != _ties(other):
        found.append(f"ties: {_ties(mine)} for {_ties(other)}")
    flags = [(name, module.training) for name, module in ours.named_modules()]
    if flags != [(name, module.training) for name, module in theirs.named_modules()]:
        found.append("training flags")
    return found + settings(ours, theirs)


def settings(ours: Any, theirs: Any) -> list[str]:
    """What differs between the configurations of two models, schedulers or tokenizers."""
    if not hasattr(theirs, "config"):
        return []
    a, b = (
        item.config.to_dict() if hasattr(item.config, "to_dict") else dict(item.config) for item in (ours, theirs)
    )
    names = sorted(a.keys() | b.keys())
    return [f"configuration: {name}: {a.get(name)} for {b.get(name)}" for name in names if a.get(name) != b.get(name)]


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
