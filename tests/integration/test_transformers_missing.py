"""Weights that a checkpoint lacks get the values that Transformers gives them: deterministic ones bit-equal, random
ones of the same distribution."""

from __future__ import annotations

import logging
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

SELECTED = ("bert", "llama", "gpt2", "t5", "bart", "clip", "vit", "wav2vec2", "mamba", "mixtral")
# Transformers initialises the weight that these make, and gives them whatever the memory held.
_LEFT_AS_FOUND = ".parametrizations."
_LAYER = re.compile(r"\.\d+\.")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def saved(model_type: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A class of a model type, and the checkpoint of a tiny model of it, every value of which is 7."""
    cls = tiny.classes_of(model_type)[0]
    torch.manual_seed(0)
    cls(tiny.tiny_config(model_type, cls)).save_pretrained(folder)
    return cls, {name: torch.full_like(value, 7) for name, value in load_file(folder / "model.safetensors").items()}


def groups(names: list[str]) -> dict[str, list[str]]:
    """Names that differ only in the number of their layer."""
    found = defaultdict(list)
    for name in names:
        found[_LAYER.sub(".*.", name)].append(name)
    return found


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """None when two random tensors may come from one distribution; else what differs."""
    a, b = ours.detach().double().flatten(), theirs.detach().double().flatten()
    if a.numel() < 2:
        return None
    spread = max(float(b.std()), 1e-12)
    error = spread / a.numel() ** 0.5
    if abs(float(a.mean() - b.mean())) > 7 * error:
        return f"mean {float(a.mean()):.4g} for {float(b.mean()):.4g}"
    if abs(float(a.std() - b.std())) > 7 * error:
        return f"deviation {float(a.std()):.4g} for {float(b.std()):.4g}"
    low, high = float(b.min()) - 3 * spread, float(b.max()) + 3 * spread
    if float(a.min()) < low or float(a.max()) > high:
        return f"range {float(a.min()):.4g} to {float(a.max()):.4g}"
    return None


def faults(cls: Any, folder: Path, state: dict[str, torch.Tensor], dropped: list[str]) -> list[str]:
    """What differs when ``dropped`` are missing."""
    save_file({name: value for name, value in state.items() if name not in dropped}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    try:
        cls.from_pretrained(folder)
    except RuntimeError:  # one of several that are merged: no model can be made of it
        with pytest.raises(RuntimeError):
            wl.from_pretrained(cls, folder)
        return []
    (ours, info), (theirs, expected) = both(cls, folder)
    found = differences(ours, theirs, values=False)
    if info != expected:
        found.append(f"loading info: {info} for {expected}")
    torch.manual_seed(99)
    again = cls.from_pretrained(folder)
    first, second = named(theirs), named(again)
    for name, value in named(ours).items():
        if torch.equal(first[name], second[name]):  # not random
            if not torch.equal(value, first[name]):
                found.append(f"{name}: values")
        elif _LEFT_AS_FOUND not in name and (what := alike(value, first[name])) is not None:
            found.append(f"{name}: {what}")
    return found


@pytest.mark.parametrize("model_type", SELECTED[:5])
def test_all_at_once(model_type: str, tmp_path: Path) -> None:
    """A checkpoint with one key only: everything else is initialised."""
    cls, state = saved(model_type, tmp_path)
    assert faults(cls, tmp_path, state, list(state)[1:]) == []


@pytest.mark.full
@pytest.mark.parametrize("model_type", SELECTED)
def test_each_group_of_keys_in_turn(model_type: str, tmp_path: Path) -> None:
    cls, state = saved(model_type, tmp_path)
    found = {group: faults(cls, tmp_path, state, names) for group, names in groups(list(state)).items()}
    assert {group: items for group, items in found.items() if items} == {}


def test_the_same_seed_gives_the_same_values_whatever_else_is_missing(tmp_path: Path) -> None:
    cls, state = saved("bert", tmp_path)
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.manual_seed(5)
    values = []
    for dropped in ([name], list(state)[1:]):
        save_file({key: value for key, value in state.items() if key not in dropped}, tmp_path / "model.safetensors",
                  {"format": "pt"})  # fmt: skip
        (ours, _), _ = both(cls, tmp_path)
        values.append(ours.get_parameter(name).detach().clone())
    assert torch.equal(*values)
    assert 0.015 < values[0].std() < 0.025
