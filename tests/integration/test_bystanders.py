"""Loads while another thread is within accelerate's ``init_empty_weights``, which patches all threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from tests.parity import diffusers_pipelines as tiny
from tests.parity.compare import differences, native_only
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

import weightlift as wl

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}

pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    """Begins another thread's ``init_empty_weights``, which ends with the test."""
    inside, end = threading.Event(), threading.Event()

    def work() -> None:
        with init_empty_weights():
            inside.set()
            end.wait(60)

    thread = threading.Thread(target=work)

    def begin() -> None:
        thread.start()
        assert inside.wait(60)
        assert nn.Linear(1, 1).weight.is_meta  # nobody else's models are safe from it

    yield begin
    end.set()
    thread.join()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_tie_and_what_is_missing(tmp_path: Path, dtype: torch.dtype | None, elsewhere: Any) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "headless")
    cases: list[tuple[Any, str]] = [(LlamaForCausalLM, "tied"), (BertForMaskedLM, "headless")]

    def loads() -> list[Any]:
        torch.manual_seed(0)
        return [
            wl.from_pretrained(cls, tmp_path / name, dtype=dtype, output_loading_info=True) for cls, name in cases
        ]

    before = loads()
    elsewhere()
    with native_only():
        meanwhile = loads()
    for (model, info), (wanted, expected) in zip(meanwhile, before, strict=True):
        assert info == expected
        assert differences(model, wanted) == []


def test_a_model_of_diffusers(tmp_path: Path, elsewhere: Any) -> None:
    vae = tiny.vae()
    vae.save_pretrained(tmp_path)
    before = wl.from_pretrained(type(vae), tmp_path)
    elsewhere()
    with native_only():
        assert differences(wl.from_pretrained(type(vae), tmp_path), before) == []
