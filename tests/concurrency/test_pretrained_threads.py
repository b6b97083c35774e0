"""Many threads load Transformers models: every one is right, nothing of the process changes, nobody is disturbed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.concurrency.watch import check, in_process
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import weightlift as wl
from weightlift.locks import LOADING


def _loads(folder: Path, each: int, mode: str) -> None:
    result = in_process("many_pretrained", folder, 8, each, mode, timeout_s=590)
    assert result["right"] == 8 * each, result
    check(result)


@pytest.mark.parametrize("mode", ["direct", "installed"])
def test_eight_threads_load_models_of_several_classes(tmp_path: Path, mode: str) -> None:
    _loads(tmp_path, 8, mode)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["direct", "installed"])
def test_a_thousand_loads(tmp_path: Path, mode: str) -> None:
    _loads(tmp_path, 125, mode)


LONG_SECONDS = 60
CONFIG = LlamaConfig(
    hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16,
    tie_word_embeddings=True,
)  # fmt: skip


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.missing = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.linspace(0, 1, 4), persistent=False)


@pytest.fixture
def replaced(tmp_path: Path) -> Iterator[threading.Event]:
    """While a thread loads a model that is left to Transformers, which sets the process's default dtype and replaces
    ``tie_weights``; until the event is set."""
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "llama")
    building, over = threading.Event(), threading.Event()

    class Own(LlamaForCausalLM):  # its way of loading is not weightlift's to change
        def __init__(self, config: LlamaConfig) -> None:
            building.set()
            over.wait(LONG_SECONDS)
            super().__init__(config)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return LlamaForCausalLM.from_pretrained.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined]

    load = threading.Thread(target=lambda: wl.from_pretrained(Own, tmp_path / "llama", dtype=torch.bfloat16))
    load.start()
    try:
        assert building.wait(LONG_SECONDS)
        assert torch.get_default_dtype() == torch.bfloat16
        yield over
    finally:
        over.set()
        load.join(LONG_SECONDS)


def _linears(**options: Any) -> nn.Module:
    whole = {"read.weight": torch.ones(4, 4, dtype=torch.float32), "read.bias": torch.ones(4, dtype=torch.float32)}
    return wl.load(Linears, whole, strict=False, seed=3, **options)


LOADS: dict[str, Callable[[Path], nn.Module]] = {
    "by hand": lambda folder: _linears(),
    "built ordinarily": lambda folder: _linears(defer=False),
    "deferred": lambda folder: wl.defer(Linears, seed=3).materialize(),
    "planned": lambda folder: wl.plan(Linears, {}, strict=False).execute(),
    "tied": lambda folder: wl.load(lambda: LlamaForCausalLM(CONFIG), folder / "llama"),
}


@pytest.mark.parametrize("kind", LOADS)
def test_constructors_run_as_in_a_quiet_process_beside_a_load_that_is_left_to_transformers(
    kind: str, replaced: threading.Event, tmp_path: Path
) -> None:
    made: list[nn.Module] = []
    thread = threading.Thread(target=lambda: made.append(LOADS[kind](tmp_path)))
    thread.start()
    while thread.is_alive() and not LOADING._queue:  # it waits, or is done
        thread.join(0.001)
    replaced.set()
    thread.join(LONG_SECONDS)
    (module,) = made
    assert {value.dtype for value in (*module.parameters(), *module.buffers())} == {torch.float32}
    if kind == "tied":
        assert module.lm_head.weight is module.model.embed_tokens.weight  # type: ignore[union-attr]
    elif kind in ("by hand", "deferred"):
        expected = wl.defer(Linears, seed=3).materialize().state_dict()
        assert torch.equal(module.state_dict()["missing.weight"], expected["missing.weight"])
