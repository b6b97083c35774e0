"""Whose `_init_weights` runs: only modules within which something has no value yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity.compare import native_only
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import weightlift as wl

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip
# The rotary tables are in no checkpoint, so these always have something to be asked about.
ALWAYS = {"", "model", "model.rotary_emb"}
LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("missing", "besides"),
    [
        (None, set()),
        ("model.norm.weight", {"model.norm"}),
        ("model.embed_tokens.weight", {"model.embed_tokens", "lm_head"}),
        (
            f"{LAYER}.self_attn.q_proj.weight",
            {"model.layers", LAYER, f"{LAYER}.self_attn", f"{LAYER}.self_attn.q_proj"},
        ),
    ],
)
def test_a_complete_module_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str | None, besides: set[str]
) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    if missing is not None:
        del state[missing]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    asked: list[nn.Module] = []
    original = PreTrainedModel._init_weights

    def note(self: Any, module: nn.Module) -> None:
        asked.append(module)
        original(self, module)

    monkeypatch.setattr(PreTrainedModel, "_init_weights", note)
    with native_only():
        model: Any = wl.from_pretrained(LlamaForCausalLM, tmp_path)
    names = {id(module): name for name, module in model.named_modules()}
    assert {names[id(module)] for module in asked} == ALWAYS | besides
    assert all(module._is_hf_initialized for module in model.modules()), "Transformers marks every module"
    for name, value in state.items():
        if name != missing:
            assert torch.equal(model.state_dict()[name], value), name
