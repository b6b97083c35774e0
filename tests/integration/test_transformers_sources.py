"""Where models come from: hub ids in a local cache, code that a repository brings along, adapters on a base model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tests.concurrency import audit
from tests.parity.compare import differences, native_only
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

import weightlift as wl
from weightlift.integrations.transformers.model import ORIGINAL

ROOT = Path(__file__).parents[2]


def test_hub_ids_and_code_of_repositories(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.hub_program"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter of a tied Llama."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def adapted(cls: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    theirs, expected = cls.from_pretrained(folder, output_loading_info=True, **options)
    with native_only():
        ours, info = wl.from_pretrained(cls, folder, output_loading_info=True, **options)
    assert info == expected
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
def test_an_adapter_and_its_base(adapter: Path, cls: Any, dtype: torch.dtype) -> None:
    """The base model natively, then Transformers' own loading of the adapter, which patches nothing."""
    ours, theirs = adapted(cls, adapter, dtype=dtype)
    assert differences(ours, theirs) == []
    assert any("lora_A.default" in name for name, _ in ours.named_parameters())
    assert ours.peft_config.keys() == theirs.peft_config.keys()
    tokens = torch.arange(6)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("options", [{}, {"revision": "main", "adapter_kwargs": {"revision": "main"}}], ids=str)
def test_an_adapter_of_a_base_whose_code_is_trusted(adapter: Path, options: dict[str, Any]) -> None:
    ours, theirs = adapted(AutoModelForCausalLM, adapter, trust_remote_code=True, **options)
    assert differences(ours, theirs) == []
    assert any("lora_A.default" in name for name, _ in ours.named_parameters())


def test_adapters_by_name_and_from_threads(adapter: Path) -> None:
    ours, theirs = adapted(LlamaForCausalLM, adapter, adapter_name="mine")
    assert differences(ours, theirs) == []
    before, attributes = audit.ambient(), audit.attributes()
    with ThreadPoolExecutor(8) as pool, native_only():
        models = list(
            pool.map(lambda _: wl.from_pretrained(LlamaForCausalLM, adapter, adapter_name="mine"), range(40))
        )
    assert [differences(model, theirs) for model in models] == [[]] * 40
    after = audit.ambient()
    after["rng"] = before["rng"]  # peft draws what it then overwrites
    assert audit.differences(before, after) == []
    assert audit.differences(attributes, audit.attributes()) == []


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    """A Wav2Vec2 with adapters for two more languages, one of another vocabulary."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
        conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True, adapter_attn_dim=4,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    model.save_pretrained(tmp_path)
    adapter = {key: torch.randn_like(value) for key, value in model._get_adapters().items()}
    save_file(adapter, tmp_path / "adapter.fra.safetensors")
    head = {"lm_head.weight": torch.randn(23, 16), "lm_head.bias": torch.randn(23)}
    torch.save({key: torch.randn_like(value) for key, value in adapter.items()} | head, tmp_path / "adapter.deu.bin")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("language", [None, "fra", "deu"])
@pytest.mark.parametrize("cls", [Wav2Vec2ForCTC, AutoModelForCTC])
def test_the_adapter_of_a_language(languages: Path, cls: Any, language: str | None, dtype: torch.dtype) -> None:
    """Wav2Vec2 puts it in where other classes tie."""
    ours, theirs = adapted(cls, languages, target_lang=language, dtype=dtype)
    assert differences(ours, theirs) == []
    assert ours.lm_head.out_features == (23 if language == "deu" else 20)


def test_a_language_without_an_adapter(languages: Path) -> None:
    with pytest.raises(OSError, match=r"adapter\.spa\.bin"):
        wl.from_pretrained(Wav2Vec2ForCTC, languages, target_lang="spa")


def test_the_folder_by_its_name_in_transformers(adapter: Path) -> None:
    base = adapter.parent / "base"
    for cls in (LlamaForCausalLM, AutoModelForCausalLM):
        assert wl.mapped_files(wl.from_pretrained(cls, pretrained_model_name_or_path=base))


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
def test_without_a_first_argument_the_librarys_own_error(cls: Any) -> None:
    missing = r"from_pretrained\(\) missing 1 required positional argument: 'pretrained_model_name_or_path'"
    with pytest.raises(TypeError, match=missing):
        wl.from_pretrained(cls)
    wl.install()
    try:
        with pytest.raises(TypeError, match=missing):
            cls.from_pretrained()
    finally:
        wl.uninstall()


def test_damaged_safetensors_are_an_error_of_theirs_too(adapter: Path) -> None:
    base = adapter.parent / "base"
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(SafetensorError):
        ORIGINAL.__func__(LlamaForCausalLM, base)
    for kind in (SafetensorError, wl.CheckpointError):
        with pytest.raises(kind, match=r"beyond the end of the file"):
            wl.from_pretrained(LlamaForCausalLM, base)
