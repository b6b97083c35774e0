"""Checkpoints that are quantised already: natively where the quantiser only replaces modules, else still right.

Each test is skipped where its package is not installed.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.concurrency import audit
from tests.parity.compare import FellBack, both, differences, native_only
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import weightlift as wl
from weightlift.deferred.tape import Node
from weightlift.locks import LOADING

TOKENS = torch.arange(5)[None]
WEIGHTS: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    "int-quantized": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "float-quantized": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
}


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def compressed(base: Path, form: str) -> Path:
    """The model with its linear layers compressed by the library itself."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    group = {"targets": ["Linear"], "weights": WEIGHTS[form], "format": form}
    fields = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
              "ignore": ["lm_head"], "config_groups": {"group_0": group}}  # fmt: skip
    config = QuantizationConfig.model_validate(fields)
    model = LlamaForCausalLM.from_pretrained(base)
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight_scale
            rows = module.weight.data.reshape(*scale.shape, -1)
            scale.data = (rows.abs().amax(-1) / 7).to(scale.dtype)
    ModelCompressor(quantization_config=config).compress_model(model)
    folder = base.parent / form
    folder.mkdir()
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((base / "config.json").read_text())
    written["quantization_config"] = json.loads(config.model_dump_json())
    (folder / "config.json").write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", WEIGHTS)
def test_compressed_tensors_are_native(base: Path, form: str, dtype: torch.dtype) -> None:
    folder = compressed(base, form)
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, folder, dtype=dtype)
    assert differences(ours, theirs) == []
    assert info == expected
    assert any(not p.dtype.is_floating_point or p.element_size() == 1 for p in ours.parameters())
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.is_quantized
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    for _ in range(2):  # the first decompresses
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)


def test_nothing_is_computed_for_what_is_compressed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compressed(base, "pack-quantized")
    ran = []
    execute = Node.execute
    monkeypatch.setattr(Node, "execute", lambda node, seed: (ran.append(node), execute(node, seed))[1])
    with native_only():
        wl.from_pretrained(LlamaForCausalLM, folder)
    assert [str(node.func) for node in ran if sum(record.nbytes for record in node.writes) > 1 << 10] == []


def test_a_compressed_tensor_that_is_missing(base: Path) -> None:
    folder = compressed(base, "pack-quantized")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, folder)
    assert info == expected
    assert differences(ours, theirs, values=False) == []


def test_compressed_tensors_on_disk(base: Path, tmp_path: Path) -> None:
    """What stays in its file keeps the flags that the quantiser gave it."""
    folder = compressed(base, "pack-quantized")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    options = {"device_map": {**places, "model.layers": "disk"}, "offload_folder": tmp_path / "offloaded"}
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, folder, **options)
    assert info == expected
    assert differences(ours, theirs) == []


def test_integers_where_the_model_has_another_dtype(base: Path) -> None:
    """Transformers doesn't cast what is quantised: the model gets it as it is."""
    folder = compressed(base, "pack-quantized")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    state[name] = torch.ones_like(state[name], dtype=torch.int32)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    theirs = LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(FellBack, match=r"int32 where the model has torch\.float32"), native_only():
        ours = wl.from_pretrained(LlamaForCausalLM, folder)
    assert ours.get_parameter(name).dtype == torch.int32
    assert differences(ours, theirs) == []


def test_compressed_tensors_from_threads(base: Path) -> None:
    folder = compressed(base, "pack-quantized")
    theirs = LlamaForCausalLM.from_pretrained(folder)
    before, attributes = audit.ambient(), audit.attributes()
    with ThreadPoolExecutor(8) as pool, native_only():
        models = list(pool.map(lambda _: wl.from_pretrained(LlamaForCausalLM, folder), range(24)))
    assert [differences(model, theirs) for model in models] == [[]] * 24
    assert audit.differences(before, audit.ambient()) == []
    changed = audit.differences(attributes, audit.attributes())
    assert [item for item in changed if "RemovableHandle.next_id" not in item] == []  # torch counts hooks


def quantised_by(package: str, base: Path) -> Path:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    pytest.importorskip(package)
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    else:
        config = BitsAndBytesConfig(load_in_4bit=True)
    LlamaForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(base.parent / package)
    return base.parent / package


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_what_is_not_native_is_still_right(base: Path, package: str) -> None:
    """These make tensors of their own out of several of the checkpoint's."""
    folder = quantised_by(package, base)
    theirs = LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(FellBack, match="quantised by"), native_only():
        ours = wl.from_pretrained(LlamaForCausalLM, folder)
    assert {type(p) for p in ours.parameters()} == {type(p) for p in theirs.parameters()}
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)


ASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8": (FineGrainedFP8HfQuantizer, {"quant_method": "fp8"}),
    "4 bits": (Bnb4BitHfQuantizer, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "8 bits": (Bnb8BitHfQuantizer, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "no method": (Bnb4BitHfQuantizer, {"load_in_4bit": True}),
}


def asked(monkeypatch: pytest.MonkeyPatch, quantiser: Any, cls: Any, folder: Path) -> list[bool]:
    """Whether the load was alone in the process, each time that a quantiser was asked for. It lets none pass."""
    alone = []

    def refuse(self: Any, **_: Any) -> None:
        alone.append(LOADING.writing)
        raise ImportError("not in this environment")

    monkeypatch.setattr(quantiser, "validate_environment", refuse)
    with pytest.raises(ImportError, match="not in this environment"):
        wl.from_pretrained(cls, folder)
    return alone


@pytest.mark.parametrize("name", ASKED)
def test_a_quantiser_that_is_not_native_is_asked_once(base: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says comes once, too."""
    quantiser, entry = ASKED[name]
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": entry}))
    assert asked(monkeypatch, quantiser, LlamaForCausalLM, base) == [True]


@pytest.mark.parametrize("entry", [{"dequantize": True}, {"run_compressed": False}], ids=str)
def test_compressed_tensors_that_say_so_themselves(
    base: Path, entry: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they are to be dequantised is in the checkpoint's configuration: it is left to Transformers at once."""
    folder = compressed(base, "pack-quantized")
    file = folder / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "quantization_config": {**written["quantization_config"], **entry}}))
    assert asked(monkeypatch, CompressedTensorsHfQuantizer, LlamaForCausalLM, folder) == [True]


def test_the_quantiser_of_a_text_model_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**small, vocab_size=64, quantization_config={"quant_method": "fp8"})
    vision = CLIPVisionConfig(**small, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())["text_config"]
    found = asked(monkeypatch, FineGrainedFP8HfQuantizer, LlavaForConditionalGeneration, tmp_path)
    assert found == [True]


def test_compressed_tensors_that_are_dequantised_are_not_native(base: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    folder = compressed(base, "pack-quantized")
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = CompressedTensorsConfig(**{**written, "dequantize": True})
    theirs = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(FellBack), native_only():
        ours = wl.from_pretrained(LlamaForCausalLM, folder, quantization_config=config)
    assert differences(ours, theirs) == []


@pytest.fixture(params=["pack-quantized", "float-quantized"])
def experts(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A mixture of experts, compressed by the library one expert after the other, as such models are published."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weights = WEIGHTS[request.param]
    group = {"targets": ["Linear"], "weights": weights, "format": request.param}
    fields = {"quant_method": "compressed-tensors", "format": request.param, "quantization_status": "compressed",
              "ignore": ["lm_head", "re:.*gate$"], "config_groups": {"group_0": group}}  # fmt: skip
    config = QuantizationConfig.model_validate(fields)
    compressor = BaseCompressor.get_value_from_registry(request.param)
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**small, num_key_value_heads=2, vocab_size=64, num_local_experts=2))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    state: dict[str, torch.Tensor] = {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if value.ndim != 2 or ".layers." not in name or name.endswith(".gate.weight"):
            state[name] = value
            continue
        rows = value.reshape(len(value), -1, weights.get("group_size", value.shape[1]))
        local = {"weight": value, "weight_scale": (rows.abs().amax(-1) / 7).float() * 1.001}  # not a bfloat16
        made = compressor.compress(local, config.config_groups["group_0"])
        state |= {f"{name.removesuffix('weight')}{key}": item.contiguous() for key, item in made.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"] = json.loads(config.model_dump_json())
    (tmp_path / "config.json").write_text(json.dumps(written))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compressed_experts(experts: Path, dtype: torch.dtype) -> None:
    """They are unpacked while they load, as Transformers has them in one tensor: packed integers and scales are not
    cast before, and what comes out is not cast either."""
    (ours, info), (theirs, expected) = both(MixtralForCausalLM, experts, dtype=dtype)
    assert info == expected
    assert differences(ours, theirs) == []
    if dtype is torch.bfloat16:
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
