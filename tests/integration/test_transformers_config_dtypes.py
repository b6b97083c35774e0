"""What constructors of Transformers find in their configurations: the dtypes that they find without weightlift."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import pickle
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.parity.compare import FellBack, both, differences
from torch import nn
from transformers import AutoModel, BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig as Configuration

import weightlift as wl
from weightlift.integrations.transformers.dtypes import Dtypes

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def _bert(given: Any) -> BertConfig:
    return given if isinstance(given, BertConfig) else BertConfig(**(given or SMALL))


class LooksConfig(PreTrainedConfig):
    """``known`` is declared and gets the model's dtype; ``own`` is not, and keeps its own."""

    model_type = "weightlift-looks"
    sub_configs: ClassVar = {"known": BertConfig}

    def __init__(self, known: Any = None, own: Any = None, **kwargs: Any) -> None:
        self.known, self.own = _bert(known), _bert(own)
        super().__init__(**kwargs)


class Keeper(nn.Module):
    """No model of Transformers', and it calls its configuration by another name."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept


class Looks(PreTrainedModel):
    config_class = LooksConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen: list[Any] = []
        self._look(config)
        self.linear = nn.Linear(4, 4)
        self.dtypes_part = nn.Linear(4, 4) if config.dtype == torch.bfloat16 else nn.Identity()
        self.copied = Keeper(copy.deepcopy(config))
        self.shallow = Keeper(copy.copy(config.own))
        self.pickled = Keeper(pickle.loads(pickle.dumps(config.own)))
        self.known = AutoModel.from_config(config.known)
        self._look(config)
        self.own = AutoModel.from_config(config.own)
        self._look(config)
        self.of_copy = AutoModel.from_config(copy.deepcopy(config.own))
        self.post_init()

    def _look(self, config: Any) -> None:
        written = config.to_dict()
        self.seen.append([config.dtype, config.known.dtype, config.own.dtype, config.__class__, repr(config)])
        self.seen.append([written["dtype"], written["known"]["dtype"], written["own"]["dtype"]])


def _dtypes(model: Any) -> list[Any]:
    """All that can be known of dtypes from the configurations that a model holds, and what these are."""
    found = list(model.seen)
    for name, module in model.named_modules():
        for key in ("config", "kept"):
            item = vars(module).get(key)
            if isinstance(item, Configuration):
                parts = [vars(part)["dtype"] for part in vars(item).values() if isinstance(part, Configuration)]
                found.append((name, key, vars(item).get("dtype"), id(type(item)), parts, item.to_dict()))
    return found


@pytest.mark.parametrize("own", [None, "float16"])
@pytest.mark.parametrize("saved", [{}, {"dtype": "float16"}, {"torch_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("dtype", [None, "auto", torch.bfloat16, {"": torch.bfloat16, "known": torch.float16}], ids=str)
def test_constructors_see_the_dtypes_of_their_configurations(
    dtype: Any, saved: dict[str, str], own: Any, tmp_path: Path
) -> None:
    Looks(LooksConfig(dtype=torch.bfloat16)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for part in (config, config["known"], config["own"]):
        part.pop("dtype", None)
    config["own"]["dtype"] = own
    file.write_text(json.dumps({**config, **saved}))
    (ours, info), (theirs, their_info) = both(Looks, tmp_path, dtype=dtype)
    assert _dtypes(ours) == _dtypes(theirs) and info["missing_keys"] == their_info["missing_keys"]
    assert differences(ours, theirs) == []
    again = copy.deepcopy(ours.copied.kept)
    assert type(again) is LooksConfig and again.dtype == ours.dtype == ours.config.dtype


class Copies(Looks):
    """Copies that are gone leave their place in memory to those that stay."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.kept = []
        for _ in range(200):
            copy.deepcopy(config)
            self.kept.append(copy.deepcopy(config.own))


def test_all_copies_are_of_their_own_class_in_the_end(tmp_path: Path) -> None:
    Looks(LooksConfig()).save_pretrained(tmp_path)
    model = wl.from_pretrained(Copies, tmp_path, dtype=torch.bfloat16)
    assert all(type(kept) is BertConfig for kept in model.kept)


SHARED = BertConfig(**SMALL)


class HalvesConfig(PreTrainedConfig):
    """As Mimi's: its part is made of it whenever it is asked for. Another belongs to everybody."""

    model_type = "weightlift-halves"

    @property
    def half(self) -> Any:
        return BertConfig(**{**SMALL, "dtype": self.to_dict()["dtype"]})

    @property
    def shared(self) -> Any:
        return SHARED


class Halves(PreTrainedModel):
    config_class = HalvesConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.part = AutoModel.from_config(config.half)
        self.is_shared = type(config.shared) is BertConfig
        self.post_init()


def test_parts_that_a_configuration_makes_when_asked_are_native(tmp_path: Path) -> None:
    Halves(HalvesConfig()).save_pretrained(tmp_path)
    (ours, _), (theirs, _) = both(Halves, tmp_path, dtype=torch.bfloat16)
    assert differences(ours, theirs) == [] and ours.part.config.dtype == theirs.part.config.dtype == torch.bfloat16
    assert type(ours.part.config) is BertConfig and ours.is_shared


class Breaks(Looks):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config.dtype = torch.float64
        raise KeyError("as it comes")


def test_a_load_that_fails_leaves_the_callers_configuration_as_it_was(tmp_path: Path) -> None:
    Looks(LooksConfig()).save_pretrained(tmp_path)
    config = LooksConfig(dtype=torch.float16)
    before = copy.deepcopy(vars(config))
    with pytest.raises(KeyError, match="as it comes"):
        wl.from_pretrained(Breaks, tmp_path, config=config, dtype=torch.bfloat16)
    assert vars(config) == before and type(config) is LooksConfig and type(config.own) is BertConfig


class Sets(PreTrainedModel):
    """Gives the configuration of its part another dtype, or makes it anew; and does not mind errors."""

    config_class = LooksConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        own = copy.deepcopy(config.own)
        if config.problem_type == "regression":
            own = BertConfig(**config.own.to_dict())
        else:
            own.dtype = torch.float16
        with contextlib.suppress(Exception):
            self.own = AutoModel.from_config(own)
        self.after = nn.Linear(4, 4)
        self.post_init()


@pytest.mark.parametrize("problem_type", [None, "regression"])
def test_dtypes_that_the_constructor_sets_are_left_to_transformers(problem_type: Any, tmp_path: Path) -> None:
    Sets(LooksConfig(problem_type=problem_type, own={**SMALL, "dtype": "bfloat16"})).save_pretrained(tmp_path)
    with pytest.raises(FellBack, match="a sub-model"):
        both(Sets, tmp_path, dtype=torch.bfloat16)
    ours = wl.from_pretrained(Sets, tmp_path, dtype=torch.bfloat16)
    assert ours.after.weight.dtype == torch.bfloat16
    assert ours.own.dtype == (torch.bfloat16 if problem_type else torch.float16)


@pytest.fixture
def default_dtypes() -> Iterator[set[torch.dtype]]:
    """The default dtypes of the process that another thread sees meanwhile."""
    seen: set[torch.dtype] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.add(torch.get_default_dtype())

    thread = threading.Thread(target=look)
    thread.start()
    yield seen
    stop.set()
    thread.join()


def test_the_process_default_stays_what_it_is(default_dtypes: set[torch.dtype], tmp_path: Path) -> None:
    Looks(LooksConfig()).save_pretrained(tmp_path)
    for _ in range(3):
        wl.from_pretrained(Looks, tmp_path, dtype=torch.bfloat16)
    assert default_dtypes == {torch.float32}


def test_classes_of_configurations_do_not_pile_up() -> None:
    found = []
    for _ in range(300):
        made = type("MadeConfig", (PreTrainedConfig,), {"model_type": "weightlift-made"})
        found.append(weakref.ref(made))
        with Dtypes(made(), torch.float32):
            pass
    del made
    gc.collect()
    assert sum(item() is not None for item in found) <= 256
