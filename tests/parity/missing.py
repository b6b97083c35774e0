"""Checkpoints that lack, exceed or misfit what a model wants, loaded both ways."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity import tiny
from tests.parity.compare import both, differences, named

import weightlift as wl

_LAYER = re.compile(r"\.\d+\.")
LOADED = 7.0  # every value of a checkpoint's first group of keys; the next has 8.0, and so on
_FEW = 8  # so few random values tell nothing of their distribution
_MANY = 1 << 20  # so many tell it all


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ only in the number of their layer."""
    found = defaultdict(list)
    for name in names:
        found[_LAYER.sub(".*.", name)].append(name)
    return dict(found)


class Checkpoint:
    """A model's checkpoint, in one file for each group of keys: a group is dropped by leaving it out of the index, and
    no tensor is written anew. The values of a group are all the same number, and no other group's."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.folder = folder
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        self._like = {name: value.to("meta") for name, value in tensors.items()}
        self.groups = groups(tensors)
        self._value = {name: LOADED + i for i, names in enumerate(self.groups.values()) for name in names}
        self._files: dict[str, str] = {}
        for number, names in enumerate(self.groups.values()):
            self._write(f"group-{number}.safetensors", {name: self.tensor(name) for name in names})
        self.drop([])

    def tensor(self, name: str) -> torch.Tensor:
        """What the checkpoint holds of a name."""
        return torch.full_like(self._like[name], self._value[name], device="cpu")

    def targets(self, loaded: dict[str, torch.Tensor]) -> dict[str, list[str]]:
        """The names of ``loaded`` that each group gave its values, for the groups of which no other had a part in that.
        A group that is not seen at all (its numbers are not kept as they are) is left out."""
        group_of = {LOADED + i: group for i, group in enumerate(self.groups)}
        found = defaultdict(list)
        partial = set()
        for name, tensor in loaded.items():
            values = tensor.detach().flatten()
            whole = values.numel() > 0 and bool((values == values[0]).all())
            here = {group_of[item] for item in (values[:1] if whole else values.unique()).tolist() if item in group_of}
            for group in here:
                found[group].append(name)
            if not whole:
                partial |= here
        return {group: names for group, names in found.items() if group not in partial}

    def _write(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.folder / file, {"format": "pt"})
        self._files.update(dict.fromkeys(tensors, file))

    def drop(self, dropped: Collection[str]) -> None:
        """From now on the checkpoint lacks these groups of keys, and no others."""
        gone = {name for group in dropped for name in self.groups[group]}
        files = {name: file for name, file in self._files.items() if name not in gone}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        alone = self.folder / "model.safetensors"  # read rather than what the index names
        alone.unlink(missing_ok=True)
        if not files:  # an index of nothing is none
            save_file({}, alone, {"format": "pt"})

    def misfit(self) -> None:
        """From now on it has a key too many, and one of another shape."""
        group = next(names for names in self.groups.values() if self._like[names[0]].dim())
        tensors = {name: self.tensor(name) for name in group}
        tensors[group[0]] = torch.cat([tensors[group[0]], tensors[group[0]][:1]])
        self._write("misfit.safetensors", {"one.too.many": torch.zeros(3), **tensors})
        self.drop([])


def prepared(cls: Any, model_type: str, folder: Path) -> tuple[Any, Checkpoint]:
    """A tiny model of a class, and its checkpoint. Raises what tells that there is none, or that Transformers does not
    load it."""
    torch.manual_seed(0)
    model = cls(tiny.tiny_config(model_type, cls))
    checkpoint = Checkpoint(model, folder)
    tiny.save_beside(model_type, folder)
    cls.from_pretrained(folder)
    return model, checkpoint


@dataclass
class Seen:
    """Names of what Transformers does that ours does not: it leaves values uninitialised; it loads them, and then
    initialises them in part nevertheless (a row for padding), where ours has what the checkpoint says."""

    uninitialised: set[str] = field(default_factory=set)
    overwritten: set[str] = field(default_factory=set)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Torch fills memory that nobody initialises with nan, so that what Transformers leaves so is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def faults(cls: Any, checkpoint: Checkpoint, dropped: Collection[str], seen: Seen | None = None) -> list[str] | None:
    """What differs when these groups of keys are missing; None where neither library makes a model then (of keys that
    are merged, some are missing). Adds to ``seen``."""
    seen = Seen() if seen is None else seen
    folder = checkpoint.folder
    checkpoint.drop(dropped)
    try:
        with poisoned():
            torch.manual_seed(99)
            first = named(cls.from_pretrained(folder))
    except RuntimeError:
        with pytest.raises(RuntimeError):
            wl.from_pretrained(cls, folder)
        return None
    with poisoned():
        (ours, info), (theirs, expected) = both(cls, folder)
    found = differences(ours, theirs, values=False)
    if info != expected:
        found.append(f"loading info: {info} for {expected}")
    second = named(theirs)
    for name, value in named(ours).items():
        if (what := _fault(name, value, first[name], second[name], seen)) is not None:
            found.append(f"{name}: {what}")
    return found


def _fault(name: str, ours: torch.Tensor, first: torch.Tensor, second: torch.Tensor, seen: Seen) -> str | None:
    """What is wrong with one tensor, which Transformers gave other random values in ``first`` than in ``second``."""
    if torch.equal(first, second):  # not random, and no nan
        if torch.equal(ours, first):
            return None
        value = ours.flatten()[0]
        if value >= LOADED and bool((ours == value).all()) and bool((first == value).any()):
            seen.overwritten.add(name)
            return None
        return "values"
    if _is_poison(first) or _is_poison(second):
        seen.uninitialised.add(name)
        return "not initialised" if _is_poison(ours) else None
    fixed = (first == second).flatten(1).all(1) if first.dim() > 1 and first[0].numel() >= _FEW else torch.tensor([])
    if fixed.any() and not torch.equal(ours[fixed], first[fixed]):
        return "values of the rows that are not random"
    return alike(ours, first)


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """None when two random tensors may come from one distribution; else what differs."""
    step = ours.numel() // _MANY + 1
    a, b = (item.detach().flatten()[::step].to(torch.float64) for item in (ours, theirs))
    if a.numel() < _FEW:
        return None
    spread = max(float(a.std()), float(b.std()), 1e-12)
    error = spread / a.numel() ** 0.5
    if abs(float(a.mean() - b.mean())) > 7 * error:
        return f"mean {float(a.mean()):.4g} for {float(b.mean()):.4g}"
    if abs(float(a.std() - b.std())) > 7 * error:
        return f"deviation {float(a.std()):.4g} for {float(b.std()):.4g}"
    low, high = float(theirs.min()) - 3 * spread, float(theirs.max()) + 3 * spread
    if float(ours.min()) < low or float(ours.max()) > high:
        return f"range {float(ours.min()):.4g} to {float(ours.max()):.4g}"
    return None


def _is_poison(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point and bool(tensor.isnan().any())


def misfits(cls: Any, checkpoint: Checkpoint) -> list[str]:
    """What differs when the checkpoint has a key too many and one of another shape. It keeps them."""
    checkpoint.misfit()
    folder = checkpoint.folder
    for load in (cls.from_pretrained, functools.partial(wl.from_pretrained, cls)):
        with pytest.raises(RuntimeError):
            load(folder)
    try:
        (ours, info), (theirs, expected) = both(cls, folder, ignore_mismatched_sizes=True)
    except RuntimeError:  # a part of what is merged: neither can
        return []
    found = differences(ours, theirs, values=False)
    return found if info == expected else [*found, f"loading info: {info} for {expected}"]
