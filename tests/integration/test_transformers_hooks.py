"""Steps of the loading that a class overrides: all of them run, natively or in Transformers' own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.compare import FellBack, differences, native_only
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedModel

import weightlift as wl
from weightlift.integrations.transformers.hooks import LOADING_HOOKS, PART_HOOKS

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
CALLED = ("_init_weights", "init_weights", "post_init", "_adjust_missing_and_unexpected_keys", "eval", "train",
          "_get_dtype_plan", "get_expanded_tied_weights_keys", "set_use_kernels")  # fmt: skip
OF_THE_CLASS = ("get_init_context", "_load_pretrained_model", "_finalize_model_loading")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A checkpoint that lacks the pooler."""
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def overriding(base: Any, name: str) -> tuple[Any, list[str]]:
    """A class that notes the calls of a method, and the notes."""
    notes: list[str] = []

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        notes.append(name)
        return getattr(super(made, self), name)(*args, **kwargs)

    def noted_of_class(*args: Any, **kwargs: Any) -> Any:
        notes.append(name)
        return getattr(base, name)(*args, **kwargs)

    method: Any = staticmethod(noted_of_class) if name in OF_THE_CLASS else noted
    made = type(f"With{name}", (base,), {name: method, "__module__": __name__})
    return made, notes


@pytest.mark.parametrize("name", [*LOADING_HOOKS, *PART_HOOKS])
def test_a_step_that_is_not_called_here_runs_in_transformers_own_way(bert: Path, name: str) -> None:
    if not hasattr(BertModel, name):
        BertModel(BertConfig(**SMALL))  # which puts it into torch
    cls, notes = overriding(BertModel, name)
    theirs = cls.from_pretrained(bert)
    called = len(notes)
    notes.clear()
    with pytest.raises(FellBack, match=name), native_only():
        ours = wl.from_pretrained(cls, bert)
    assert len(notes) == called > 0
    assert differences(ours, theirs, values=False) == []


@pytest.mark.parametrize("name", CALLED)
def test_a_step_that_is_called_stays_native(bert: Path, name: str) -> None:
    cls, notes = overriding(BertModel, name)
    cls.from_pretrained(bert)
    assert notes
    notes.clear()
    with native_only():
        assert type(wl.from_pretrained(cls, bert)) is cls
    assert notes


def test_transformers_own_classes_and_those_that_only_derive_from_them_stay_native(bert: Path) -> None:
    class Derived(BertForMaskedLM):
        pass

    with native_only():
        wl.from_pretrained(Derived, bert)


class Counting(BertModel):
    seen = 0

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        type(self).seen += 1
        super()._initialize_weights(module, is_custom_code)


class Around(PreTrainedModel):
    config_class = BertConfig
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = Counting(config)
        self.post_init()


def test_a_step_of_a_model_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Around(BertConfig(**SMALL)).save_pretrained(tmp_path)
    monkeypatch.setattr(Counting, "seen", 0)
    theirs = Around.from_pretrained(tmp_path)
    called, Counting.seen = Counting.seen, 0
    with pytest.raises(FellBack, match=r"Counting\._initialize_weights"), native_only():
        ours = wl.from_pretrained(Around, tmp_path)
    assert Counting.seen == called > 0
    assert differences(ours, theirs) == []


class Hooked(BertModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.told: list[str] = []
        self.encoder.register_load_state_dict_pre_hook(lambda *_: self.told.append("before"))
        self.encoder.register_load_state_dict_post_hook(lambda *_: self.told.append("after"))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
def test_hooks_of_load_state_dict_are_not_called_by_either(bert: Path, options: Any) -> None:
    theirs = Hooked.from_pretrained(bert, **options)
    with native_only():
        ours = wl.from_pretrained(Hooked, bert, **options)
    assert ours.told == theirs.told == []


class Scale(nn.Module):
    """Its extra state is a tensor, as is that of layers with scales of their own."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.scale = torch.full((2,), 3.0, dtype=dtype)
        self.weight = nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> torch.Tensor:
        return self.scale

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scale = state


class Told(nn.Module):
    """Nothing of it is in a state dict, so nobody misses it."""

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError(state)


class Scaled(BertModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scales = nn.ModuleList([Scale(torch.float32), Scale(torch.uint8), Scale(None)])
        self.rest = Told()


@pytest.mark.parametrize("given", ["files", "pickle", "state dict"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}])
def test_extra_state_that_is_a_tensor(tmp_path: Path, given: str, options: Any) -> None:
    model = Scaled(BertConfig(**SMALL))
    for scale in model.scales:
        scale.scale = scale.scale + 1
    model.save_pretrained(tmp_path)
    name: Any = tmp_path
    if given == "pickle":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    elif given == "state dict":
        name, options = None, {**options, "config": model.config, "state_dict": model.state_dict()}
    theirs, info = Scaled.from_pretrained(name, output_loading_info=True, **options)
    with native_only():
        ours, my_info = wl.from_pretrained(Scaled, name, output_loading_info=True, **options)
    assert my_info == info and differences(ours, theirs) == []
    for mine, original in zip(ours.scales, theirs.scales):
        assert mine.scale.dtype == original.scale.dtype
        assert mine.scale.device == original.scale.device
        assert mine.scale.tolist() == original.scale.tolist() == [4, 4]
