"""Sub-models whose configuration names a dtype of its own: built in it natively, as Transformers builds them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.parity.compare import FellBack, both, differences
from torch import nn
from transformers import AutoModel, BertConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

import weightlift as wl

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


class PairConfig(PreTrainedConfig):
    """Two configurations that it does not declare, so that Transformers does not make their dtypes one."""

    model_type = "weightlift-pair"

    def __init__(self, first: Any = None, second: Any = None, copies: bool = False, **kwargs: Any) -> None:
        self.first = first if isinstance(first, BertConfig) else BertConfig(**(first or SMALL))
        self.second = second if isinstance(second, LlamaConfig) else LlamaConfig(**(second or SMALL))
        self.copies = copies
        super().__init__(**kwargs)


class Pair(PreTrainedModel):
    config_class = PairConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.before = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor([1.5]))
        self.first = AutoModel.from_config(copy.deepcopy(config.first) if config.copies else config.first)
        self.between = nn.Linear(4, 4)
        self.second = AutoModel.from_config(config.second)
        self.after = nn.Parameter(torch.arange(4) / 3)
        self.post_init()


class NestConfig(PreTrainedConfig):
    """A declared configuration, whose own parts get its dtype when a sub-model is made of it."""

    model_type = "weightlift-nest"
    sub_configs: ClassVar = {"pair": PairConfig}

    def __init__(self, pair: Any = None, **kwargs: Any) -> None:
        self.pair = pair if isinstance(pair, PairConfig) else PairConfig(**(pair or {}))
        super().__init__(**kwargs)


class Nest(PreTrainedModel):
    config_class = NestConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.pair = Pair._from_config(config.pair)
        self.extra = AutoModel.from_config(config.pair.first)
        self.post_init()


def _saved(model: Any, folder: Path, *, at: tuple[str, ...] = (), **changes: Any) -> Path:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    pair = config
    for name in at:
        pair = pair[name]
    pair["first"]["dtype"], pair["second"]["dtype"] = "bfloat16", "float16"
    pair.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64, "auto"], ids=str)
def test_each_sub_model_is_in_its_own_dtype(dtype: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = _saved(Pair(PairConfig()), tmp_path)
    (ours, info), (theirs, their_info) = both(Pair, folder, dtype=dtype)
    assert differences(ours, theirs) == [] and info == their_info
    assert ours.first.dtype == torch.bfloat16 and ours.second.dtype == torch.float16
    assert ours.after.dtype == ours.between.weight.dtype == ours.scale.dtype == ours.before.weight.dtype
    assert ours.config.first.dtype == theirs.config.first.dtype
    before = torch.get_default_dtype()
    assert before == torch.float32


def test_a_dtype_is_passed_on_to_declared_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = _saved(Nest(NestConfig()), tmp_path, at=("pair",))
    (ours, info), (theirs, their_info) = both(Nest, folder, dtype=torch.float32)
    assert differences(ours, theirs) == [] and info == their_info


def test_missing_weights_of_another_dtype(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    folder = _saved(Pair(PairConfig()), tmp_path)
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("second.layers.0.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    (ours, info), (theirs, their_info) = both(Pair, folder)
    assert info == their_info
    for name, value in theirs.state_dict().items():
        mine = ours.state_dict()[name]
        assert mine.dtype == value.dtype and (name not in kept or torch.equal(mine, value)), name


def test_a_copied_configuration_has_the_dtype_of_what_it_was_copied_from(tmp_path: Path) -> None:
    folder = _saved(Pair(PairConfig()), tmp_path, copies=True)
    (ours, info), (theirs, their_info) = both(Pair, folder)
    assert differences(ours, theirs) == [] and info == their_info
    assert ours.first.dtype == theirs.first.dtype == torch.bfloat16


class Named(PreTrainedModel):
    """As Transformers has it, its part is in this dtype and the process's default is while it is made."""

    config_class = BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.part = AutoModel.from_config(BertConfig(**SMALL), dtype=torch.bfloat16)
        self.after = nn.Linear(4, 4)
        self.post_init()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_constructor_that_names_a_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    Named(BertConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(FellBack, match=r"makes in torch\.bfloat16"):
        both(Named, tmp_path, dtype=dtype)
    ours = wl.from_pretrained(Named, tmp_path, dtype=dtype)
    assert ours.part.dtype == torch.bfloat16 and ours.after.weight.dtype == dtype
