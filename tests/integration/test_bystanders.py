"""Loads while another thread is within accelerate's ``init_empty_weights``, which patches all threads."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def elsewhere_begun() -> Iterator[None]:
    """Another thread's ``init_empty_weights``."""
    inside, end = threading.Event(), threading.Event()

    def work() -> None:
        with init_empty_weights():
            inside.set()
            end.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert inside.wait(60)
        assert nn.Linear(1, 1).weight.is_meta  # nobody else's models are safe from it
        yield
    finally:
        end.set()
        thread.join()


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    """Begins another thread's ``init_empty_weights``, which ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(elsewhere_begun())


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


class Net(nn.Module):
    """With what a wrapped parameter would lose: ties, attributes, what is frozen, data of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.layer = nn.Linear(8, 8)
        self.layer.bias.requires_grad_(False)
        self.layer.weight.note = "kept"  # type: ignore[attr-defined]
        self.other = nn.Linear(8, 8)
        self.other.weight.data = torch.full((8, 8), 0.5)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(4.0) / 3, persistent=False)


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("missing", [(), ("layer.weight", "other.weight"), ("embed.weight", "head.weight")])
def test_any_module(times: int, missing: tuple[str, ...]) -> None:
    state = {name: tensor for name, tensor in Net().state_dict().items() if name not in missing}
    expected = wl.load(Net, state, strict=False, seed=3)
    with contextlib.ExitStack() as stack:
        for _ in range(times):  # the second wraps what the first has wrapped
            stack.enter_context(elsewhere_begun())
        models = [wl.load(Net, state, strict=False, seed=3), wl.defer(Net, seed=3).load(state, strict=False)]
    for model in models:
        assert differences(model, expected) == []
        assert model.head.weight is model.embed.weight
        assert model.layer.weight.note == "kept"
        assert vars(model.layer.weight) == vars(expected.layer.weight)
        assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, True, True]


def test_in_the_callable_itself() -> None:
    """Where it was written to save what a load saves anyway."""

    def build() -> nn.Module:
        with init_empty_weights():
            return Net()

    model = wl.load(build, {}, strict=False, seed=3)
    assert differences(model, wl.load(Net, {}, strict=False, seed=3)) == []
