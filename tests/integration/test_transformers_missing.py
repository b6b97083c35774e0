"""Weights that a checkpoint lacks get the values that Transformers gives them: deterministic ones bit-equal, random
ones of the same distribution.

By default a selection runs; ``-m full`` drops every group of keys of every model type.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity import tiny
from tests.parity.compare import both
from tests.parity.missing import faults, groups, misfits, saved, write

SELECTED = ("bert", "llama", "gpt2", "t5", "bart")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def prepared(model_type: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A class of a model type that can be made tiny, and its checkpoint."""
    for cls in tiny.heads_first(model_type):
        try:
            return cls, saved(cls, model_type, folder)
        except Exception:
            continue
    pytest.skip("no class of it can be made tiny")


@pytest.mark.parametrize("model_type", SELECTED)
def test_all_at_once(model_type: str, tmp_path: Path) -> None:
    """A checkpoint with one key only: everything else is initialised."""
    cls, state = prepared(model_type, tmp_path)
    assert faults(cls, tmp_path, state, list(state)[1:]) == []


@pytest.mark.parametrize("model_type", SELECTED)
def test_a_key_too_many_and_one_of_another_shape(model_type: str, tmp_path: Path) -> None:
    cls, state = prepared(model_type, tmp_path)
    assert misfits(cls, tmp_path, state) == []


@pytest.mark.full
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_each_group_of_keys_in_turn(model_type: str, tmp_path: Path) -> None:
    cls, state = prepared(model_type, tmp_path)
    found = {group: faults(cls, tmp_path, state, names) for group, names in groups(list(state)).items()}
    found["misfits"] = misfits(cls, tmp_path, state)
    assert {group: items for group, items in found.items() if items} == {}


def test_what_the_checkpoint_holds_is_not_overwritten(tmp_path: Path) -> None:
    """Transformers makes ChineseCLIP's row for padding zero after it has loaded it, whatever the checkpoint says."""
    cls, state = prepared("chinese_clip_text_model", tmp_path)
    write(tmp_path, state)
    (ours, _), (theirs, _) = both(cls, tmp_path)
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(ours.get_parameter(name), state[name])
    assert not theirs.get_parameter(name)[0].any(), "Transformers no longer does so: docs/transformers.md says it does"


def test_the_same_seed_gives_the_same_values_whatever_else_is_missing(tmp_path: Path) -> None:
    cls, state = prepared("bert", tmp_path)
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.manual_seed(5)
    values = []
    for dropped in ([name], list(state)[1:]):
        write(tmp_path, {key: value for key, value in state.items() if key not in dropped})
        (ours, _), _ = both(cls, tmp_path)
        values.append(ours.get_parameter(name).detach().clone())
    assert torch.equal(*values)
    assert 0.015 < values[0].std() < 0.025
