"""Checkpoints as they lie on disks: keys dropped, added, renamed, of other shapes and dtypes, in any kind of file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_LAYER = re.compile(r"\.\d+\.")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ADDED = ("extra.weight", "ignored.weight", "layers.7.rotary_emb.inv_freq", "embeddings.position_ids", "head.extra",
         "lm_head.bias", "weight")  # fmt: skip
Step = tuple[Any, ...]
State = dict[str, torch.Tensor]


def untied(state: State, ties: Sequence[tuple[str, str]], which: str) -> State:
    """The state dict with one name of each tie, both, neither, or both with other values."""
    state = dict(state)
    for target, source in ties:
        if which in ("first", "neither"):
            state.pop(target, None)
        if which in ("last", "neither"):
            state.pop(source, None)
        if which == "differ" and target in state:
            state[target] = state[target] + 1
    return state


def altered(state: State, steps: Sequence[Step], prefix: str) -> State:
    """The state dict after a few changes; ``prefix`` is that of the base model."""
    for name, number, how in steps:
        if not state and name != "add":
            return state
        keys = list(state)
        key = keys[number % len(keys)] if keys else ""
        if name == "drop":
            del state[key]
        elif name == "drop alike":
            state = {item: value for item, value in state.items() if _LAYER.sub(".", item) != _LAYER.sub(".", key)}
        elif name == "add":
            state[("", f"{prefix}.", "other.")[number % 3] + ADDED[how % len(ADDED)]] = torch.ones(3)
        elif name == "misshape":
            state[key] = _misshapen(state[key], how)
        elif name == "cast":
            state[key] = state[key].to(DTYPES[how % len(DTYPES)])
        elif name == "cast all":
            dtype = DTYPES[how % len(DTYPES)]
            state = {item: value.to(dtype) if value.is_floating_point() else value for item, value in state.items()}
        elif name == "prefix":
            added = (f"{prefix}.", "module.", "model.")[how % 3]
            state = {added + item: value for item, value in state.items()}
        elif name == "unprefix":
            state = {item.removeprefix(f"{prefix}."): value for item, value in state.items()}
        elif name == "legacy":
            state = {_legacy(item): value for item, value in state.items()}
        elif name == "turn":
            state[key] = state[key].t().contiguous().t() if state[key].dim() == 2 else state[key]
        elif name == "share":
            state = _sharing(state, key)
    return state


def _misshapen(value: torch.Tensor, how: int) -> torch.Tensor:
    if how % 4 == 0 and value.dim():
        return torch.cat([value, value[:1]])
    if how % 4 == 1:
        return value[None]
    if how % 4 == 2 and value.dim():
        return value.reshape(-1)
    return value.new_zeros(0, 3)


def _legacy(key: str) -> str:
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _sharing(state: State, key: str) -> State:
    """Every tensor of the shape of ``key``'s is that very tensor: pickles hold it once."""
    value = state[key]
    return {
        item: value if other.shape == value.shape and other.dtype == value.dtype else other
        for item, other in state.items()
    }


FORMS = ("safetensors", "sharded", "bin", "sharded bin", "both", "plain")


def write(state: State, folder: Path, form: str, variant: str | None) -> None:
    """The state dict as files of a form: one or three of safetensors or pickles, both, or without metadata."""
    marked = "" if variant is None else f".{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    solid = {key: value.clone().contiguous() for key, value in state.items()}
    if form in ("safetensors", "plain", "both"):
        metadata = None if form == "plain" else {"format": "pt"}
        save_file(solid, folder / f"model{marked}.safetensors", metadata)
    if form in ("bin", "both"):
        torch.save(state, folder / f"pytorch_model{marked}.bin")
    if form in ("sharded", "sharded bin"):
        _write_sharded(solid if form == "sharded" else state, folder, marked, form)


def _write_sharded(state: State, folder: Path, marked: str, form: str) -> None:
    stem, end = ("model", ".safetensors") if form == "sharded" else ("pytorch_model", ".bin")
    files: dict[str, str] = {}
    for at in range(3):
        part = {key: value for number, (key, value) in enumerate(state.items()) if number % 3 == at}
        name = f"{stem}{marked}-0000{at + 1}-of-00003{end}" if marked else f"{stem}-0000{at + 1}-of-00003{end}"
        if form == "sharded":
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name)
        files.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / f"{stem}{end}.index{marked}.json").write_text(json.dumps(index))


def as_saved(model: Any, folder: Path) -> State:
    """The state dict that ``save_pretrained`` writes: what is merged on loading is apart."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")
