"""Keys are named once for each form of key; the names are those of Transformers, for every rule that it has."""

from __future__ import annotations

import random
import re
from copy import deepcopy

import pytest
import torch
from tests.parity.compare import both, differences
from transformers import BertConfig, BertModel
from transformers import core_model_loading as core
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

from weightlift.integrations.transformers.names import Names, in_natural_order

MAPPINGS = _build_checkpoint_conversion_mapping()


def keys_for(transforms, rng):
    """Keys that the rules were written for, with all kinds of numbers in all kinds of places; and some others."""
    stems = ["model.layers.#.mlp.experts.#.w1.weight", "layers.#.#", "a#.#b.7.weight", "#", "#.#.x.#", "١.#.weight"]
    for item in transforms:
        for pattern in (*item.source_patterns, *item.target_patterns):
            plain = re.sub(r"\\d\+|\(\\d\+\)|\*|\[0-9\]\+?", "#", pattern)
            plain = re.sub(r"\(\?[^)]*\)|[\^$\\()]", "", plain).replace("|", ".")
            stems += [plain, f"model.{plain}", f"model.layers.#.{plain}.weight"]
            stems += [f"{plain}{plain}", f"x.#.{plain}.#.bias"]
    numbers = ["0", "1", "2", "3", "7", "10", "11", "07", "123"]
    for stem in stems:
        for _ in range(6):
            yield re.sub("#", lambda _: rng.choice(numbers), stem)


@pytest.mark.parametrize("name", sorted(MAPPINGS))
def test_names_are_those_of_transformers(name):
    transforms = deepcopy(MAPPINGS[name])
    rng = random.Random(name)
    keys = list(dict.fromkeys(keys_for(transforms, rng)))
    renamings = [item for item in transforms if isinstance(item, core.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, core.WeightConverter)]
    wanted = [core.rename_source_key(key, renamings, converters)[0] for key in keys]
    some = {f"model.{key}": 0 for key in wanted[::3]} | {key.removeprefix("model."): 0 for key in wanted[1::3]}
    expected = some | dict.fromkeys(keys[::5], 0)
    used = [item.was_used() for item in transforms]
    for item in transforms:
        item._was_used = False
    names = Names(renamings, converters, "model", expected)
    for key in keys:
        found = core.rename_source_key(key, renamings, converters, "model", expected)
        if found[0] not in expected and key in expected:
            found = core.rename_source_key(key, [], [], "model", expected)
        assert names.of(key) == found, key
    assert [item.was_used() for item in transforms] == used


def test_one_question_for_all_experts():
    transforms = deepcopy(MAPPINGS["mixtral"])
    renamings = [item for item in transforms if isinstance(item, core.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, core.WeightConverter)]
    names = Names(renamings, converters, "model", {})
    for layer in range(30):
        for expert in range(40):
            for part in ("w1", "w2", "w3"):
                names.of(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight")
    # By the lengths of the two numbers.
    assert len(names._forms) == 3 * 4
    assert all(form is not None for form in names._forms.values())


def test_a_number_that_becomes_part_of_a_name_is_not_filled_in():
    renamings = [core.WeightRenaming(r"layers\.", "layers"), core.WeightRenaming("layers3", "third")]
    names = Names(renamings, [], "", {})
    for key in ("layers.3.a", "layers.4.a", "layers.5.a"):
        assert names.of(key) == core.rename_source_key(key, renamings, [])


@pytest.mark.parametrize(
    ("pattern", "target"),
    [
        (r"blocks\.3\.", "third."), (r"blocks\.[0-3]\.", "few."), (r"(\d+)\.(?P<same>\d)x(?P=same)", "x"),
        ("end", "end.0"),
    ],
)  # fmt: skip
def test_a_rule_that_tells_numbers_apart_is_asked_for_every_key(pattern, target):
    renamings = [core.WeightRenaming(pattern, target)]
    names = Names(renamings, [], "", {})
    for key in ("blocks.2.w", "blocks.3.w", "blocks.4.w", "blocks.1.2x3.w", "blocks.1.2x2.w", "blocks.0.end", "0.end"):
        assert names.of(key) == core.rename_source_key(key, renamings, [])


@pytest.mark.parametrize("names", [("weight", "gamma"), ("gamma", "weight")])
def test_of_two_keys_with_one_name_the_first_in_that_order_counts(tmp_path, names):
    cls = BertModel
    model = cls(BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    stem, state = "embeddings.LayerNorm", model.state_dict()
    del state[f"{stem}.weight"]
    state |= {f"{stem}.{name}": torch.full((8,), float(len(name))) for name in names}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (ours, _), (theirs, _) = both(cls, tmp_path)
    assert differences(ours, theirs) == []


def test_the_order_is_that_of_transformers():
    rng = random.Random(0)
    parts = ["layers", "a", "b2", "b10", "b", "01", "1", "2", "10", "²", "", "weight", "x9y", "w_1", "w_01"]
    keys = [".".join(rng.choices(parts, k=rng.randrange(1, 6))) for _ in range(3000)]
    # "²" is a digit to Python, but no number
    keys = [key for key in keys if "²" not in key]
    assert in_natural_order(keys) == sorted(keys, key=core.dot_natural_key)
