"""Code of a model's own that loading calls: all of it runs, natively or in Diffusers' own way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors.torch import load_file, save_file
from tests.parity import diffusers_pipelines as tiny
from tests.parity.compare import FellBack, differences, native_only
from tests.parity.diffusers_compare import ORIGINAL, both, same_info
from torch import nn

import weightlift as wl
from weightlift.integrations.diffusers.single_file import ORIGINAL as SINGLE_ORIGINAL

FILE = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tiny.vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def fell_back(match: str, load: Callable[[], Any]) -> Any:
    """What a load gives that is left to Diffusers because of ``match``."""
    with pytest.raises(FellBack, match=match), native_only():
        load()
    return load()


# -- steps of a class --------------------------------------------------------------------------------------------------


class Computing(AutoencoderKL):
    def _fix_state_dict_keys_on_load(self, state_dict: Any) -> None:
        super()._fix_state_dict_keys_on_load(state_dict)
        state_dict["encoder.conv_in.bias"] = state_dict["encoder.conv_in.bias"] * 2


class Renaming(AutoencoderKL):
    def _fix_state_dict_keys_on_load(self, state_dict: Any) -> None:
        one, other = "encoder.conv_norm_out.bias", "encoder.conv_norm_out.weight"
        state_dict[one], state_dict[other] = state_dict[other], state_dict[one]


class Filling(AutoencoderKL):
    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        made = super()._load_pretrained_model(model, *args, **kwargs)
        with torch.no_grad():
            model.encoder.conv_in.bias.mul_(2)
        return made


class Typed(AutoencoderKL):
    @classmethod
    def _set_default_torch_dtype(cls, dtype: torch.dtype) -> Any:
        return super()._set_default_torch_dtype(torch.float32)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found = torch.get_default_dtype()

    __init__.__wrapped__ = AutoencoderKL.__init__  # type: ignore[attr-defined]


class Partial(AutoencoderKL):
    """One whose state dict has only a part of it."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        return {name: value for name, value in found.items() if not name.startswith("decoder.conv_in")}


def leave_out(module: Any, state: Any, prefix: str, metadata: Any) -> None:
    del state["decoder.conv_in.bias"]


@pytest.mark.parametrize(("cls", "step"), [
    (Computing, r"Computing\._fix_state_dict_keys_on_load"),
    (Renaming, r"Renaming\._fix_state_dict_keys_on_load"),
    (Filling, r"Filling\._load_pretrained_model"),
    (Typed, r"Typed\._set_default_torch_dtype"),
    (Partial, r"Partial\.state_dict"),
])  # fmt: skip
def test_a_step_that_is_not_called_here_runs_in_diffusers_own_way(vae: Path, cls: Any, step: str) -> None:
    theirs, info = ORIGINAL.__func__(cls, vae, dtype=torch.bfloat16, output_loading_info=True)
    ours, my_info = fell_back(
        step, lambda: wl.from_pretrained(cls, vae, dtype=torch.bfloat16, output_loading_info=True)
    )
    assert differences(ours, theirs) == [] and same_info(my_info, info)
    assert getattr(ours, "found", None) == getattr(theirs, "found", None)


def test_hooks_of_state_dict_and_a_state_dict_of_the_objects_own(vae: Path) -> None:
    class Hooked(AutoencoderKL):
        @classmethod
        def from_config(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().from_config(*args, **kwargs)
            made.register_state_dict_post_hook(leave_out)
            return made

    class Own(AutoencoderKL):
        @classmethod
        def from_config(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().from_config(*args, **kwargs)
            made.state_dict = partial(AutoencoderKL.state_dict, made)
            return made

    for cls, what in ((Hooked, "Hooked: hooks of state_dict"), (Own, "Own: a state_dict")):
        fell_back(what, partial(wl.from_pretrained, cls, vae))
        fell_back(what, partial(wl.from_single_file, cls, str(vae / FILE), config=str(vae), low_cpu_mem_usage=False))


def test_a_load_state_dict_of_the_class_own(vae: Path) -> None:
    class Loading(AutoencoderKL):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict({**state_dict, "encoder.conv_in.bias": torch.ones(32)}, *args, **kwargs)

    file, given = str(vae / FILE), {"config": str(vae), "low_cpu_mem_usage": False}
    ours = fell_back(r"Loading\.load_state_dict", lambda: wl.from_single_file(Loading, file, **given))
    assert torch.equal(ours.encoder.conv_in.bias, torch.ones(32))
    with native_only():
        wl.from_single_file(Loading, file, config=str(vae))
        wl.from_pretrained(Loading, vae, low_cpu_mem_usage=False)


def test_a_step_that_is_called_stays_native(vae: Path) -> None:
    called = []

    class Calling(AutoencoderKL):
        @classmethod
        def from_config(cls, *args: Any, **kwargs: Any) -> Any:
            called.append("from_config")
            return super().from_config(*args, **kwargs)

        @classmethod
        def load_config(cls, *args: Any, **kwargs: Any) -> Any:
            called.append("load_config")
            return super().load_config(*args, **kwargs)

    with native_only():
        wl.from_pretrained(Calling, vae)
    assert called == ["load_config", "from_config"]


# -- hooks of modules, which are called where no memory is saved ------------------------------------------------------


def rename(state: dict[str, Any], prefix: str, *_: Any) -> None:
    if f"{prefix}old" in state:
        state[f"{prefix}weight"] = state.pop(f"{prefix}old")


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self._register_load_state_dict_pre_hook(rename)


class Overriding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: Any) -> None:
        self.told = state


PARTS = {"Hooked": Hooked, "Overriding": Overriding, "Extra": Extra}


class Model(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, part: str = "Hooked") -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        if part:
            self.inner = PARTS[part]()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with an old name, and without a count of batches."""
    Model("Hooked").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / FILE
    state = load_file(file)
    del state["norm.num_batches_tracked"]
    state["inner.old"] = state.pop("inner.weight") + torch.arange(4.0)
    save_file(state, file, {"format": "pt"})
    return tmp_path / "model"


@pytest.mark.parametrize(("part", "what"), [
    ("Hooked", "Hooked: hooks of load_state_dict"),
    ("Overriding", "Overriding: _load_from_state_dict"),
    ("Extra", "Extra: set_extra_state"),
])  # fmt: skip
def test_code_that_is_called_with_the_state_dict(saved: Path, part: str, what: str) -> None:
    options: dict[str, Any] = {"part": part, "low_cpu_mem_usage": False}
    theirs = ORIGINAL.__func__(Model, saved, **options)
    ours = fell_back(what, lambda: wl.from_pretrained(Model, saved, **options))
    assert differences(ours, theirs) == []
    assert part == "Extra" or torch.equal(ours.inner.weight, torch.arange(4.0))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_hooks_after_load_state_dict_that_diffusers_does_not_call(vae: Path, low_cpu_mem_usage: bool) -> None:
    class WithHook(AutoencoderKL):
        @classmethod
        def from_config(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().from_config(*args, **kwargs)
            (made[0] if isinstance(made, tuple) else made).register_load_state_dict_post_hook(marked)
            return made

    (ours, _), (theirs, _) = both(WithHook, vae, low_cpu_mem_usage=low_cpu_mem_usage)
    assert differences(ours, theirs) == []
    assert not hasattr(ours, "marked") and not hasattr(theirs, "marked")


def test_it_is_not_called_where_memory_is_saved(saved: Path) -> None:
    with native_only():
        ours = wl.from_pretrained(Model, saved)
    assert torch.equal(ours.inner.weight, torch.zeros(4))


def test_torchs_own_batch_norm_stays_native(saved: Path) -> None:
    (ours, _), (theirs, _) = both(Model, saved, part="", low_cpu_mem_usage=False)
    assert differences(ours, theirs) == []


def doubled(state: dict[str, Any], prefix: str, *_: Any) -> None:
    state["encoder.conv_in.bias"] = state["encoder.conv_in.bias"] * 2


def marked(module: Any, incompatible: Any) -> None:
    module.marked = True


def before(model: Any) -> None:
    model._register_load_state_dict_pre_hook(doubled)


def after(model: Any) -> None:
    model.register_load_state_dict_post_hook(marked)


@pytest.mark.parametrize("hook", [before, after])
def test_hooks_of_a_model_from_a_single_file(vae: Path, hook: Callable[[Any], None]) -> None:
    class WithHook(AutoencoderKL):
        @classmethod
        def from_config(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().from_config(*args, **kwargs)
            hook(made)
            return made

    given: dict[str, Any] = {"config": str(vae), "low_cpu_mem_usage": False}
    theirs = SINGLE_ORIGINAL.__func__(WithHook, str(vae / FILE), **given)
    ours = fell_back("load_state_dict", lambda: wl.from_single_file(WithHook, str(vae / FILE), **given))
    assert differences(ours, theirs) == []
    assert hasattr(ours, "marked") == hasattr(theirs, "marked") == (hook is after)
    with native_only():
        wl.from_single_file(WithHook, str(vae / FILE), config=str(vae))
