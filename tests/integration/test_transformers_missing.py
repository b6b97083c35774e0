"""Weights that a checkpoint lacks get the values that Transformers gives them: deterministic ones bit-equal, random
ones of the same distribution.

By default a selection runs; ``-m full`` drops every group of keys of every model type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity import tiny
from tests.parity.compare import both
from tests.parity.missing import Checkpoint, faults, misfits, prepared
from tests.parity.together import each_in_turn, in_turns

SELECTED = ("bert", "llama", "gpt2", "t5", "bart")


pytestmark = pytest.mark.usefixtures("quiet")


def a_tiny(model_type: str, folder: Path) -> tuple[Any, Any, Checkpoint]:
    """A class of a model type that can be made tiny, a model of it, and its checkpoint."""
    for cls in tiny.heads_first(model_type):
        try:
            return cls, *prepared(cls, model_type, folder)
        except Exception:
            continue
    pytest.skip("no class of it can be made tiny")


@pytest.mark.parametrize("model_type", SELECTED)
def test_all_at_once(model_type: str, tmp_path: Path) -> None:
    """A checkpoint with one group of keys only: everything else is initialised."""
    cls, _, checkpoint = a_tiny(model_type, tmp_path)
    assert faults(cls, checkpoint, list(checkpoint.groups)[1:]) == []


@pytest.mark.parametrize("model_type", SELECTED)
def test_a_key_too_many_and_one_of_another_shape(model_type: str, tmp_path: Path) -> None:
    cls, _, checkpoint = a_tiny(model_type, tmp_path)
    assert misfits(cls, checkpoint) == []


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_each_group_of_keys_in_turn(model_type: str, tmp_path: Path) -> None:
    check_each_group(model_type, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_each_group_of_keys_of_every_model_type_in_turn(model_type: str, tmp_path: Path) -> None:
    check_each_group(model_type, tmp_path)


def check_each_group(model_type: str, folder: Path) -> None:
    cls, model, checkpoint = a_tiny(model_type, folder)
    turns = list(each_in_turn(cls, model, checkpoint))
    assert sum(groups for groups, _ in turns) == len(checkpoint.groups)
    assert [item for _, found in turns for item in found] == []
    assert misfits(cls, checkpoint) == []


def test_what_one_initialiser_touches_is_not_dropped_together(tmp_path: Path) -> None:
    cls, model, checkpoint = a_tiny("bert", tmp_path)
    turn_of = {group: number for number, turn in enumerate(in_turns(cls, model, checkpoint)) for group in turn}
    layer = "bert.encoder.layer.*.output"
    assert sorted(turn_of) == sorted(checkpoint.groups)
    assert turn_of[f"{layer}.dense.weight"] != turn_of[f"{layer}.dense.bias"]
    assert turn_of[f"{layer}.dense.weight"] == turn_of[f"{layer}.LayerNorm.weight"]
    tied = "bert.embeddings.word_embeddings.weight"
    assert [group for group, turn in turn_of.items() if turn == turn_of[tied]] == [tied]


def test_keys_that_are_merged_are_dropped_alone(tmp_path: Path) -> None:
    cls, model, checkpoint = a_tiny("mixtral", tmp_path)
    turns = in_turns(cls, model, checkpoint)
    experts = "model.layers.*.block_sparse_moe.experts.*."
    assert sorted(group for turn in turns for group in turn) == sorted(checkpoint.groups)
    assert [f"{experts}w1.weight"] in turns and [f"{experts}w3.weight"] in turns
    assert [f"{experts}w2.weight"] not in turns


def test_what_the_checkpoint_holds_is_not_overwritten(tmp_path: Path) -> None:
    """Transformers makes ChineseCLIP's row for padding zero after it has loaded it, whatever the checkpoint says."""
    cls, _, checkpoint = a_tiny("chinese_clip_text_model", tmp_path)
    (ours, _), (theirs, _) = both(cls, tmp_path)
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(ours.get_parameter(name), checkpoint.tensor(name))
    assert not theirs.get_parameter(name)[0].any(), "Transformers no longer does so: docs/transformers.md says it does"


def test_the_same_seed_gives_the_same_values_whatever_else_is_missing(tmp_path: Path) -> None:
    cls, _, checkpoint = a_tiny("bert", tmp_path)
    group = "bert.encoder.layer.*.output.dense.weight"
    torch.manual_seed(5)
    values = []
    for dropped in ([group], list(checkpoint.groups)[1:]):
        checkpoint.drop(dropped)
        (ours, _), _ = both(cls, tmp_path)
        values.append(ours.get_parameter(checkpoint.groups[group][0]).detach().clone())
    assert torch.equal(*values)
    assert 0.015 < values[0].std() < 0.025
