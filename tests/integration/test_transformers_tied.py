"""A tied embedding of 256,000 × 2,304 without its head in the checkpoint: nothing is initialised in vain. And tensors
that share memory in part, which Transformers gives one of its own each."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.parity.compare import FellBack, differences, native_only
from transformers import Gemma2Config, Gemma2ForCausalLM, PretrainedConfig, PreTrainedModel

import weightlift as wl
from weightlift.deferred.tape import Node
from weightlift.integrations.transformers.model import ORIGINAL

CONFIG = Gemma2Config(
    vocab_size=256_000, hidden_size=2304, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint in bfloat16, 1.18 GB of zeros that take no room on the disk, with ones at both ends of each."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Gemma2ForCausalLM(CONFIG).state_dict().items()}
    del shapes["lm_head.weight"]
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    one = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for item in header.values():
            for place in (item["data_offsets"][0], item["data_offsets"][1] - 2):
                file.seek(start + place)
                file.write(one)
    CONFIG.dtype = torch.bfloat16
    CONFIG.architectures = ["Gemma2ForCausalLM"]
    CONFIG.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, int]]:
    """The recorded calls that ran: name, whether it samples, bytes that it writes."""
    wl.defer(lambda: torch.nn.Linear(2, 2))  # the first construction of a process tries once what trunc_normal_ does
    seen: list[tuple[str, bool, int]] = []
    execute = Node.execute

    def spy(node: Node, seed: int) -> None:
        seen.append((str(node.func), node.random, sum(record.nbytes for record in node.writes)))
        execute(node, seed)

    monkeypatch.setattr(Node, "execute", spy)
    return seen


def _samples(ran: list[tuple[str, bool, int]]) -> list[tuple[str, bool, int]]:
    """Initialisers: calls that sample, and any on more than a table of positions."""
    return [item for item in ran if item[1] or item[2] > 1 << 16]


def test_nothing_is_initialised(folder: Path, ran: list[tuple[str, bool, int]]) -> None:
    with native_only():
        model, info = wl.from_pretrained(Gemma2ForCausalLM, folder, output_loading_info=True)
    assert _samples(ran) == []
    assert info["missing_keys"] == set()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weight = model.lm_head.weight.detach()
    assert weight.dtype == torch.bfloat16
    assert weight.shape == (256_000, 2304)
    assert [float(weight[row, column]) for row, column in ((0, 0), (0, 1), (-1, -2), (-1, -1))] == [1, 0, 0, 1]


def test_what_is_missing_is_initialised_alone(folder: Path, ran: list[tuple[str, bool, int]]) -> None:
    """One small weight is: the count sees it, and nothing of the embedding."""
    missing = "model.layers.1.mlp.gate_proj.weight"
    path = folder / "model.safetensors"
    text = path.open("rb").read(1 << 20)
    length = struct.unpack("<Q", text[:8])[0]
    changed = text[8 : 8 + length].replace(missing.encode(), missing.replace("gate", "gone").encode())
    with path.open("r+b") as file:
        file.seek(8)
        file.write(changed)
    model, info = wl.from_pretrained(Gemma2ForCausalLM, folder, output_loading_info=True)
    assert info["missing_keys"] == {missing}
    assert [nbytes for _, _, nbytes in _samples(ran)] == [2 * 32 * 2304]
    assert 0.015 < model.get_parameter(missing).float().std() < 0.025


class Overlapping(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        whole = torch.zeros(9)
        self.first = torch.nn.Parameter(whole[:6])
        self.second = torch.nn.Parameter(whole[3:])
        self.post_init()


def test_parameters_that_share_memory_in_part(tmp_path: Path) -> None:
    PretrainedConfig().save_pretrained(tmp_path)
    state = {"first": torch.arange(6.0), "second": torch.arange(6.0) + 50}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = ORIGINAL.__func__(Overlapping, tmp_path)
    with pytest.raises(FellBack, match="second: it shares memory with first"), native_only():
        wl.from_pretrained(Overlapping, tmp_path)
    ours = wl.from_pretrained(Overlapping, tmp_path)
    assert differences(ours, theirs) == [] and ours.second.tolist() == state["second"].tolist()
