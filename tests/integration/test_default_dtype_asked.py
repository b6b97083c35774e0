"""Constructors that ask torch for the default dtype find the model's, as where the library sets it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.compare import FellBack, both, differences
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import weightlift as wl


class AskConfig(PreTrainedConfig):
    model_type = "weightlift-ask"


class Ask(PreTrainedModel):
    config_class = AskConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.linear = nn.Linear(4, 4)
        self.add()
        self.post_init()

    def add(self) -> None:
        raise NotImplementedError


def _default() -> torch.dtype:
    return torch.get_default_dtype()


class Helper:
    def __init__(self) -> None:
        self.dtype = _default()


class ByFactory(Ask):
    def add(self) -> None:
        self.scale = nn.Parameter(torch.zeros(2, dtype=torch.get_default_dtype()))


class ByModule(Ask):
    def add(self) -> None:
        self.part = nn.Linear(2, 2, dtype=torch.get_default_dtype())


class ByAttribute(Ask):
    def add(self) -> None:
        self.wanted = torch.get_default_dtype()


class ByNumber(Ask):
    def add(self) -> None:
        self.register_buffer("least", torch.full((2,), torch.finfo(torch.get_default_dtype()).min))


class ByHelpers(Ask):
    def add(self) -> None:
        self.scale = nn.Parameter(torch.zeros(2, dtype=Helper().dtype))


class ByThread(Ask):
    def add(self) -> None:
        thread = threading.Thread(target=lambda: setattr(self, "part", nn.Linear(2, 2)))
        thread.start()
        thread.join()


class BySetting(Ask):
    def add(self) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        self.part = nn.Linear(2, 2)
        torch.set_default_dtype(before)


class ByCastAndAnother(Ask):
    """Which of the casts asks is not known to who sees the call."""

    def add(self) -> None:
        self.register_buffer("one", torch.arange(3).to(torch.get_default_dtype()))
        self.register_buffer("other", torch.arange(3).to(torch.float32))


class ByCast(Ask):
    def add(self) -> None:
        self.register_buffer("table", torch.arange(3).to(torch.get_default_dtype()))


LEFT = [ByFactory, ByModule, ByAttribute, ByNumber, ByHelpers, ByThread, BySetting, ByCastAndAnother]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", LEFT)
def test_what_asks_in_another_form_than_a_cast_is_left_to_transformers(
    cls: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    cls(AskConfig()).save_pretrained(tmp_path)
    theirs = cls.from_pretrained(tmp_path, dtype=dtype)
    ours = wl.from_pretrained(cls, tmp_path, dtype=dtype)
    assert differences(ours, theirs) == [] and vars(ours).get("wanted") == vars(theirs).get("wanted")
    with pytest.raises(FellBack, match=r"default_dtype|Thread"):
        both(cls, tmp_path, dtype=dtype)
    (ours, _), (theirs, _) = both(cls, tmp_path, dtype=torch.float32)  # which is the process's
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_casts_to_it_are_native(dtype: torch.dtype, tmp_path: Path) -> None:
    ByCast(AskConfig()).save_pretrained(tmp_path)
    (ours, _), (theirs, _) = both(ByCast, tmp_path, dtype=dtype)
    assert differences(ours, theirs) == [] and ours.table.dtype == dtype


def test_a_constructor_that_fails_for_another_default(tmp_path: Path) -> None:
    class Asserts(Ask):
        def add(self) -> None:
            assert torch.get_default_dtype() == self.config.dtype

    Asserts(AskConfig(dtype=torch.float32)).save_pretrained(tmp_path)
    assert wl.from_pretrained(Asserts, tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_diffusers_as_well(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    configuration = pytest.importorskip("diffusers.configuration_utils")

    def _made(asks: Callable[[], torch.dtype]) -> Any:
        class Asking(diffusers.ModelMixin, configuration.ConfigMixin):  # type: ignore[misc, name-defined]
            config_name = "config.json"

            @configuration.register_to_config  # type: ignore[untyped-decorator]
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)
                self.wanted = asks()

        return Asking

    cls = _made(_default)
    cls().save_pretrained(tmp_path)
    assert wl.from_pretrained(cls, tmp_path, torch_dtype=torch.bfloat16).wanted == torch.bfloat16
