"""Models made of models: each configuration within is left as Transformers leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.compare import DTYPES, both, differences
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class PartConfig(PreTrainedConfig):
    model_type = "test_part"
    size: int = 4


class AroundConfig(PreTrainedConfig):
    model_type = "test_around"
    sub_configs_defaults = {"part": PartConfig}  # noqa: RUF012
    part: dict[str, Any] | PreTrainedConfig | None = None


class WholeConfig(AroundConfig):
    model_type = "test_whole"


class Part(PreTrainedModel):
    config_class = PartConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.size, config.size)
        self.post_init()


class Around(PreTrainedModel):
    config_class = AroundConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.part = Part._from_config(config.part)
        self.post_init()


class Whole(PreTrainedModel):
    """As PeAudioVideoModel: one part is of a configuration that the constructor makes around one of the load's."""

    config_class = WholeConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.part = Part._from_config(config.part)
        self.around = Around._from_config(AroundConfig(part=config.part))
        self.post_init()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_configuration_that_the_constructor_makes_around_one_of_the_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers", minversion="5.23", reason="5.20 can't make such a configuration")
    Whole(WholeConfig(part=PartConfig())).save_pretrained(tmp_path)
    (ours, _), (theirs, _) = both(Whole, tmp_path, dtype=dtype)
    assert differences(ours, theirs) == []
    assert theirs.config.part.dtype is None, "the one made around it has none, and passed that on"
    for name in ("part", "around", "around.part"):
        assert ours.get_submodule(name).config.dtype == theirs.get_submodule(name).config.dtype, name
