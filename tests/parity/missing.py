"""Checkpoints that lack, exceed or misfit what a model wants, loaded both ways."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity import tiny
from tests.parity.compare import both, differences, named

import weightlift as wl

_LAYER = re.compile(r"\.\d+\.")
LOADED = 7.0  # every value of the checkpoints
_FEW = 8  # so few random values tell nothing of their distribution


def saved(cls: type, model_type: str, folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint of a tiny model of a class, every value of which is `LOADED`."""
    torch.manual_seed(0)
    cls(tiny.tiny_config(model_type, cls)).save_pretrained(folder)
    return {name: torch.full_like(value, LOADED) for name, value in load_file(folder / "model.safetensors").items()}


def write(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The checkpoint with these tensors."""
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def groups(names: list[str]) -> dict[str, list[str]]:
    """Names that differ only in the number of their layer."""
    found = defaultdict(list)
    for name in names:
        found[_LAYER.sub(".*.", name)].append(name)
    return found


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """None when two random tensors may come from one distribution; else what differs."""
    a, b = (item.detach().flatten().to(torch.float64) for item in (ours, theirs))
    if a.numel() < _FEW:
        return None
    spread = max(float(a.std()), float(b.std()), 1e-12)
    error = spread / a.numel() ** 0.5
    if abs(float(a.mean() - b.mean())) > 7 * error:
        return f"mean {float(a.mean()):.4g} for {float(b.mean()):.4g}"
    if abs(float(a.std() - b.std())) > 7 * error:
        return f"deviation {float(a.std()):.4g} for {float(b.std()):.4g}"
    low, high = float(b.min()) - 3 * spread, float(b.max()) + 3 * spread
    if float(a.min()) < low or float(a.max()) > high:
        return f"range {float(a.min()):.4g} to {float(a.max()):.4g}"
    return None


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Torch fills memory that nobody initialises with nan, so that what Transformers leaves so is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def faults(
    cls: Any,
    folder: Path,
    state: dict[str, torch.Tensor],
    dropped: list[str],
    left: set[str] | None = None,
    overwritten: set[str] | None = None,
) -> list[str]:
    """What differs when ``dropped`` are missing.

    Names that Transformers leaves uninitialised go to ``left``; those that it loads and then initialises in part
    nevertheless (a row for padding), where ours has what the checkpoint says, to ``overwritten``.
    """
    write(folder, {name: value for name, value in state.items() if name not in dropped})
    try:
        with poisoned():
            torch.manual_seed(99)
            first = named(cls.from_pretrained(folder))
    except RuntimeError:  # one of several that are merged: no model can be made of it
        with pytest.raises(RuntimeError):
            wl.from_pretrained(cls, folder)
        return []
    with poisoned():
        (ours, info), (theirs, expected) = both(cls, folder)
    found = differences(ours, theirs, values=False)
    if info != expected:
        found.append(f"loading info: {info} for {expected}")
    second = named(theirs)
    for name, value in named(ours).items():
        if _is_poison(first[name]) or _is_poison(second[name]):
            if left is not None:
                left.add(name)
            if _is_poison(value):
                found.append(f"{name}: not initialised")
        elif torch.equal(first[name], second[name]):  # not random
            if torch.equal(value, first[name]):
                continue
            if bool((value == LOADED).all()) and bool((first[name] == LOADED).any()):
                if overwritten is not None:
                    overwritten.add(name)
            else:
                found.append(f"{name}: values")
        elif (what := alike(value, first[name])) is not None:
            found.append(f"{name}: {what}")
    return found


def _is_poison(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point and bool(tensor.isnan().any())


def misfits(cls: Any, folder: Path, state: dict[str, torch.Tensor]) -> list[str]:
    """What differs when the checkpoint has a key too many and one of another shape."""
    name = next(name for name, value in state.items() if value.dim())
    shape = (state[name].shape[0] + 1, *state[name].shape[1:])
    write(folder, {**state, "one.too.many": torch.zeros(3), name: torch.zeros(shape, dtype=state[name].dtype)})
    for load in (cls.from_pretrained, functools.partial(wl.from_pretrained, cls)):
        with pytest.raises(RuntimeError):
            load(folder)
    try:
        (ours, info), (theirs, expected) = both(cls, folder, ignore_mismatched_sizes=True)
    except RuntimeError:  # a part of what is merged: neither can
        return []
    found = differences(ours, theirs, values=False)
    return found if info == expected else [*found, f"loading info: {info} for {expected}"]
