"""A model is gone, and its memory free, with the last reference to it: no load leaves a cycle for the collector.

A cycle would hold two models where ``model = None; model = load(…)`` asks for one at a time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import weightlift as wl
from weightlift.integrations.exclusive import NotNative, native_or_alone

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 30,
}  # fmt: skip


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16)
        self.head = nn.Linear(8, 20, bias=False)
        nn.init.orthogonal_(self.head.weight)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(8.0) / 3, persistent=False)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.extra: object = 1

    def get_extra_state(self) -> object:
        return {"extra": self.extra}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["extra"]


class HookedExtra(Extra):
    """Whose extra state goes through a hook."""

    def _load_from_state_dict(self, state_dict: Any, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    state = {name: value.clone() for name, value in Tied().state_dict().items() if name != "head.weight"}
    save_file(state, folder / "tied.safetensors")
    torch.save(state, folder / "tied.pt")
    torch.save(Hooked().state_dict(), folder / "hooked.pt")
    torch.save(Extra().state_dict(), folder / "extra.pt")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "llama")
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(folder / "mixtral")
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "pipeline")
    return folder


def existing(folder: Path) -> nn.Module:
    model = Tied()
    wl.load(model, folder / "tied.safetensors")
    return model


def refused(folder: Path) -> nn.Module:
    model = Tied()
    with pytest.raises(wl.PlanError):
        wl.load(model, {"unknown": torch.zeros(1)})
    return model


def captured(folder: Path) -> nn.Module:
    model = wl.load(Tied, folder / "tied.safetensors")
    with wl.capture(model, hidden="layer"):
        model.layer(torch.zeros(3, 8))
    return model


def installed(folder: Path) -> nn.Module:
    wl.install()
    try:
        return AutoModelForCausalLM.from_pretrained(folder / "llama")
    finally:
        wl.uninstall()


WAYS: dict[str, Callable[[Path], Any]] = {
    "mapped": lambda folder: wl.load(Tied, folder / "tied.safetensors"),
    "copied": lambda folder: wl.load(Tied, folder / "tied.safetensors", copy=True),
    "cast": lambda folder: wl.load(Tied, folder / "tied.safetensors", dtype=torch.float64),
    "pickled": lambda folder: wl.load(Tied, folder / "tied.pt"),
    "a mapping": lambda folder: wl.load(Tied, Tied().state_dict()),
    "missing": lambda folder: wl.load(Tied, {}, strict=False, seed=1),
    "unexpected": lambda folder: wl.load(Tied, {**Tied().state_dict(), "more": torch.zeros(1)}, strict=False),
    "renamed": lambda folder: wl.load(Tied, folder / "tied.safetensors", key_mapping={r"^head\.": "head."}),
    "traced": lambda folder: wl.load(Tied, folder / "tied.safetensors", trace=folder / "trace.html"),
    "planned": lambda folder: wl.plan(Tied, folder / "tied.safetensors").execute(),
    "deferred": lambda folder: wl.defer(Tied).load(folder / "tied.safetensors"),
    "materialized": lambda folder: wl.defer(Tied).materialize(),
    "hooked": lambda folder: wl.load(Hooked, folder / "hooked.pt"),
    "extra state": lambda folder: wl.load(Extra, folder / "extra.pt"),
    "hooked extra state": lambda folder: wl.load(HookedExtra, folder / "extra.pt"),
    "existing": existing,
    "refused": refused,
    "captured": captured,
    "transformers": lambda folder: wl.from_pretrained(AutoModelForCausalLM, folder / "llama"),
    "transformers, cast": lambda folder: wl.from_pretrained(LlamaForCausalLM, folder / "llama", dtype=torch.bfloat16),
    "transformers, a new head": lambda folder: wl.from_pretrained(AutoModelForSequenceClassification, folder / "llama"),
    "transformers, experts": lambda folder: wl.from_pretrained(AutoModelForCausalLM, folder / "mixtral"),
    "transformers, installed": installed,
    "diffusers": lambda folder: wl.from_pretrained(UNet2DModel, folder / "pipeline", subfolder="unet"),
    "a pipeline": lambda folder: wl.from_pretrained(DiffusionPipeline, folder / "pipeline").unet,
}


@pytest.mark.parametrize("way", WAYS)
def test_gone_with_the_last_reference(way: str, files: Path, no_collector: None) -> None:
    WAYS[way](files)  # what is done once in a process
    gc.collect()
    before = of_ours()
    model = WAYS[way](files)
    gone = weakref.ref(model)
    del model
    assert gone() is None
    # Some of these hold memory: a recorder what small tensors are cut from, a rehearsal the values that it was offered.
    assert not of_ours() - before, "left in a cycle"


def of_ours() -> Counter[str]:
    """How many objects of which of weightlift's types, and which of its functions, there are, as far as a collector
    would look at them."""
    objects = gc.get_objects()
    functions = [item for item in objects if isinstance(item, FunctionType) and is_ours(item)]
    return Counter(item.__qualname__ for item in (*functions, *filter(is_ours, map(type, objects))))


def is_ours(kind: type | FunctionType) -> bool:
    """But for the memory of tensors: a parametrised layer of torch stands in a cycle of its own, and keeps it."""
    array = isinstance(kind, type) and issubclass(kind, ctypes.Array)
    return str(kind.__module__).startswith("weightlift.") and not array


def test_nothing_is_left_of_a_pipeline_that_failed(files: Path, no_collector: None) -> None:
    """Its other components may have been loaded meanwhile, by threads."""
    with pytest.raises(TypeError, match="nothing of the kind"):
        load_and_fail(files / "pipeline")
    gc.collect()
    before = of_ours()
    with pytest.raises(TypeError, match="nothing of the kind"):
        load_and_fail(files / "pipeline")
    assert not of_ours() - before, "left in a cycle"


def load_and_fail(folder: Path) -> None:
    class Refusing(DDPMPipeline):  # type: ignore[misc]
        def __init__(self, unet: nn.Module, scheduler: object) -> None:
            raise TypeError("nothing of the kind")

    wl.from_pretrained(Refusing, folder)


def test_nothing_is_left_of_a_load_that_failed(files: Path, no_collector: None) -> None:
    built: list[weakref.ref[nn.Module]] = []

    def build() -> nn.Module:
        model = Tied()
        built.append(weakref.ref(model))
        return model

    for source in ({}, {"unknown": torch.zeros(1)}, files / "hooked.pt"):
        with pytest.raises(wl.PlanError):
            wl.load(build, source)
    assert [gone() for gone in built] == [None, None, None]


def test_nothing_is_left_of_what_was_tried_before_its_own_library_loads(no_collector: None) -> None:
    tried: list[weakref.ref[nn.Module]] = []

    def native() -> nn.Module:
        model = Tied()
        tried.append(weakref.ref(model))
        raise NotNative("a class", "its own way of loading")

    def original() -> nn.Module:
        assert tried[0]() is None, "it would be held beside the model that is loaded now"
        return Tied()

    native_or_alone(Tied, native, original)


def test_nothing_is_left_of_a_component_that_failed(files: Path, tmp_path: Path, no_collector: None) -> None:
    """Its error came from another thread."""
    broken = shutil.copytree(files / "pipeline", tmp_path / "broken")
    (file,) = (broken / "unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    shutil.copytree(broken / "unet", broken / "second")
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "second": index["unet"]}))

    class Two(DDPMPipeline):  # type: ignore[misc]
        def __init__(self, unet: nn.Module, second: nn.Module, scheduler: object) -> None:
            super().__init__(unet, scheduler)

    def fail() -> None:
        try:  # `pytest.raises` would keep the error itself
            wl.from_pretrained(Two, broken)
        except OSError:
            return
        raise AssertionError("it was loaded")

    fail()
    gc.collect()
    before = {id(error) for error in errors()}
    fail()
    assert [error for error in errors() if id(error) not in before] == []


def errors() -> list[object]:
    """Those that there are. By their types: some objects of torch warn when they are asked what they are."""
    return [item for item in gc.get_objects() if issubclass(type(item), BaseException)]
