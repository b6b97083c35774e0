"""Constructors with calls that the CPU refuses and the meta device does not: they load as their library loads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.compare import FellBack, both, differences
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import weightlift as wl

HALVES = [torch.bfloat16, torch.float16]


class OddConfig(PreTrainedConfig):
    model_type = "weightlift-odd"


class Odd(PreTrainedModel):
    config_class = OddConfig
    made: Callable[[], torch.Tensor]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", type(self).made())
        self.post_init()


CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(3, 3)),
    "qr": lambda: torch.linalg.qr(torch.eye(3))[0],
    "svd": lambda: torch.linalg.svd(torch.eye(3))[1],
    "polar": lambda: torch.view_as_real(torch.polar(torch.ones(3), torch.arange(3.0))),
    "complex": lambda: torch.view_as_real(torch.complex(torch.ones(3), torch.zeros(3))),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_what_meta_passes_is_left_to_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    cls = type("Made", (Odd,), {"made": staticmethod(CALLS[name])})
    cls(OddConfig()).save_pretrained(tmp_path)
    ours, info = wl.from_pretrained(cls, tmp_path, dtype=dtype, output_loading_info=True)
    theirs = cls.from_pretrained(tmp_path, dtype=dtype)
    assert differences(ours, theirs) == [] and not info["missing_keys"]
    both(cls, tmp_path, dtype=torch.float32)


class Catches(Odd):
    """On meta there is nothing to catch."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.way = "without"
        with contextlib.suppress(RuntimeError):
            nn.init.orthogonal_(self.linear.weight)
            self.way = "with"

    @staticmethod
    def made() -> torch.Tensor:
        return torch.ones(2)


def test_a_constructor_that_catches_the_refusal_goes_the_way_it_goes_without(tmp_path: Path) -> None:
    Catches(OddConfig()).save_pretrained(tmp_path)
    assert wl.from_pretrained(Catches, tmp_path, dtype=torch.bfloat16).way == "with"
    with pytest.raises(FellBack, match="a call that torch refuses"):
        both(Catches, tmp_path, dtype=torch.bfloat16)


class Fails(Catches):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        raise RuntimeError("of its own")


def test_errors_of_its_own_come_as_they_are(tmp_path: Path) -> None:
    Catches(OddConfig()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"^of its own$"):
        wl.from_pretrained(Fails, tmp_path)


def test_diffusers_as_well(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    configuration = pytest.importorskip("diffusers.configuration_utils")

    class Orthogonal(diffusers.ModelMixin, configuration.ConfigMixin):  # type: ignore[misc, name-defined]
        config_name = "config.json"

        @configuration.register_to_config  # type: ignore[untyped-decorator]
        def __init__(self, size: int = 4) -> None:
            super().__init__()
            self.linear = nn.Linear(size, size)
            nn.init.orthogonal_(self.linear.weight)

    Orthogonal().save_pretrained(tmp_path)
    theirs = Orthogonal.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert differences(wl.from_pretrained(Orthogonal, tmp_path, torch_dtype=torch.bfloat16), theirs) == []
