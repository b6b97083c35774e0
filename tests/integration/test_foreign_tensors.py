"""Tensors of other classes than torch's, values that are none, and devices that are not there, in both libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from tests.parity import diffusers_pipelines as tiny
from tests.parity.compare import FellBack, native_only
from transformers import BertConfig, BertModel

import weightlift as wl
from weightlift.integrations.diffusers.model import ORIGINAL as OF_DIFFUSERS
from weightlift.integrations.transformers.model import ORIGINAL as OF_TRANSFORMERS

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}

pytestmark = pytest.mark.usefixtures("no_bars")


class Marked(torch.Tensor):
    """As the tensors of a library that quantises: a class of its own, which pickles name."""


@pytest.fixture
def allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([Marked]):
        yield


@pytest.fixture(params=["transformers", "diffusers"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Path, Path]:
    """(class, its own from_pretrained, a folder, the pickle in it)."""
    if request.param == "transformers":
        cls, model, original, name = BertModel, BertModel(BertConfig(**SMALL)), OF_TRANSFORMERS, "pytorch_model.bin"
    else:
        cls, model, original = AutoencoderKL, tiny.vae(), OF_DIFFUSERS
        name = "diffusion_pytorch_model.bin"
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / name)
    return cls, original, tmp_path, tmp_path / name


def one_of(file: Path, change: Any) -> str:
    """The first weight of a pickle, which is changed."""
    state = torch.load(file)
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name] = change(state[name])
    torch.save(state, file)
    return str(name)


@pytest.mark.usefixtures("allowed")
def test_a_pickle_with_tensors_of_a_class_that_torch_was_told_to_allow(saved: tuple[Any, Any, Path, Path]) -> None:
    cls, original, folder, file = saved
    name = one_of(file, lambda value: value.as_subclass(Marked))
    theirs = original.__func__(cls, folder).state_dict()
    with pytest.raises(FellBack, match="Marked"), native_only():
        wl.from_pretrained(cls, folder)
    ours = wl.from_pretrained(cls, folder).state_dict()
    assert type(ours[name]) is type(theirs[name])
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_one_that_was_not_allowed_is_refused(saved: tuple[Any, Any, Path, Path]) -> None:
    cls, _, folder, file = saved
    one_of(file, lambda value: value.as_subclass(Marked))
    with pytest.raises(wl.CheckpointError, match="Marked"):
        wl.from_pretrained(cls, folder)


def test_a_state_dict_with_tensors_of_a_class_of_somebody_elses() -> None:
    model = BertModel(BertConfig(**SMALL))
    state = {name: value.as_subclass(Marked) for name, value in model.state_dict().items()}
    with pytest.raises(FellBack, match="Marked"), native_only():
        wl.from_pretrained(BertModel, None, config=model.config, state_dict=state)
    theirs = OF_TRANSFORMERS.__func__(BertModel, None, config=model.config, state_dict=state).state_dict()
    ours = wl.from_pretrained(BertModel, None, config=model.config, state_dict=state).state_dict()
    assert {name: type(value) for name, value in ours.items()} == {name: type(v) for name, v in theirs.items()}


@pytest.mark.parametrize("value", [None, 3.0])
def test_a_value_that_is_no_tensor_is_refused(saved: tuple[Any, Any, Path, Path], value: Any) -> None:
    cls, original, folder, file = saved
    name = one_of(file, lambda _: value)
    with pytest.raises((TypeError, AttributeError)):
        original.__func__(cls, folder)
    with pytest.raises(wl.PlanError, match=rf"{name}: the checkpoint has no tensor for it"):
        wl.from_pretrained(cls, folder)


def test_a_device_that_is_not_there(saved: tuple[Any, Any, Path, Path]) -> None:
    cls, _, folder, _ = saved
    with pytest.raises(wl.PlanError, match=r"the device cuda:99 can't be used"):
        wl.from_pretrained(cls, folder, device_map={"": "cuda:99"})
