"""Classes with a from_pretrained of their own: the result is what that gives, with the class itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tests.parity import tiny
from tests.parity.compare import FellBack, differences, native_only
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CsmForConditionalGeneration,
    KyutaiSpeechToTextForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_layers import MtpModel
from transformers.models.auto import auto_factory
from transformers.models.timm_backbone import modeling_timm_backbone

import weightlift as wl
from weightlift.locks import LOADING

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


class Builds(BertModel):
    """Builds the model itself and fills it by itself, but for what it leaves as initialised."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        model = cls(cls.config_class.from_pretrained(path))
        state = load_file(Path(path) / "model.safetensors")
        del state["pooler.dense.weight"]
        model.load_state_dict(state, strict=False)
        return model.eval()


def test_a_model_that_is_built_by_itself_has_its_values(bert: Path) -> None:
    torch.manual_seed(1)
    theirs = Builds.from_pretrained(bert)
    torch.manual_seed(1)
    ours = wl.from_pretrained(Builds, bert)
    assert type(ours) is Builds
    assert differences(ours, theirs) == []
    assert float(ours.pooler.dense.weight.detach().std()) > 0


class Fresh(BertModel):
    """A second model beside the one that is loaded."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        model.fresh = cls(model.config)
        return model


def test_a_model_that_is_built_beside_the_loaded_one_has_its_values(bert: Path) -> None:
    torch.manual_seed(1)
    theirs = Fresh.from_pretrained(bert)
    torch.manual_seed(1)
    ours = wl.from_pretrained(Fresh, bert)
    assert type(ours.fresh) is Fresh
    assert differences(ours, theirs) == []


class Meta(type(BertModel)):  # type: ignore[misc]
    pass


class Demanding(BertModel, metaclass=Meta):
    """A metaclass, subclasses that have to say something, and a from_pretrained that looks at its class."""

    loads = 0
    subclasses: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Demanding.subclasses.append(tag)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        assert cls is Demanding
        cls.loads += 1
        model = super().from_pretrained(*args, **kwargs)
        assert isinstance(model, cls)
        return model


def test_an_override_gets_the_class_itself(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Demanding, "loads", 0)
    ours = wl.from_pretrained(Demanding, bert)
    assert type(ours) is Demanding
    assert (Demanding.loads, Demanding.subclasses) == (1, [])
    assert differences(ours, Demanding.from_pretrained(bert)) == []


class Static(BertModel):
    @staticmethod
    def from_pretrained(path: Any, **kwargs: Any) -> Any:
        return BertModel.from_pretrained(path, **kwargs)


def test_a_static_method(bert: Path) -> None:
    ours = wl.from_pretrained(Static, bert, dtype=torch.float16)
    assert differences(ours, BertModel.from_pretrained(bert, dtype=torch.float16)) == []


class PlainConfig(BertConfig):
    model_type = "weightlift_plain"


class Plain(nn.Module):
    """No model of Transformers, but registered with an Auto class."""

    config_class = PlainConfig

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.hidden_size, 2)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        return cls(config)


AutoConfig.register("weightlift_plain", PlainConfig)
AutoModel.register(PlainConfig, Plain)


def test_a_plain_module_that_is_registered_with_an_auto_class(tmp_path: Path) -> None:
    PlainConfig(**SMALL).save_pretrained(tmp_path)
    torch.manual_seed(1)
    theirs = AutoModel.from_pretrained(tmp_path)
    torch.manual_seed(1)
    ours = wl.from_pretrained(AutoModel, tmp_path)
    assert type(ours) is Plain
    assert torch.equal(ours.linear.weight, theirs.linear.weight)


def test_others_are_left_to_transformers_unless_installed(bert: Path) -> None:
    with pytest.raises(FellBack), native_only():
        wl.from_pretrained(Fresh, bert)
    wl.install()
    try:
        with native_only():
            ours = wl.from_pretrained(Demanding, bert)
    finally:
        wl.uninstall()
    assert type(ours) is Demanding


class Asking(AutoModelForCausalLM):
    """An Auto class that looks at its class."""

    def __init_subclass__(cls, *, tag: str) -> None:
        raise AssertionError(tag)


def test_an_auto_class_is_not_derived_from(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    with native_only():
        assert type(wl.from_pretrained(Asking, tmp_path)) is LlamaForCausalLM


@pytest.mark.parametrize("cls", [CsmForConditionalGeneration, KyutaiSpeechToTextForConditionalGeneration])
def test_transformers_own_overrides_are_native(cls: Any, tmp_path: Path) -> None:
    config = tiny.tiny_config(cls.config_class.model_type, cls)
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path)
    theirs = cls.from_pretrained(tmp_path)
    with native_only():
        ours, info = wl.from_pretrained(cls, tmp_path, output_loading_info=True)
    assert type(ours) is cls
    assert differences(ours, theirs) == []
    assert not info["missing_keys"]


def test_an_override_of_transformers_that_builds_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbones of timm: they are made from a name, and timm (which need not be there) fills them."""
    made = object()
    monkeypatch.setattr(modeling_timm_backbone, "requires_backends", lambda *_: None)
    monkeypatch.setattr(PreTrainedModel, "_from_config", classmethod(lambda *_, **__: made))
    with pytest.raises(FellBack, match=r"super\(\)\._from_config"), native_only():
        assert wl.from_pretrained(modeling_timm_backbone.TimmBackbone, "resnet18") is made


def test_a_backbone_of_timm_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def builds(cls: Any, name: str, **kwargs: Any) -> nn.Module:
        return nn.Linear(2, 2) if LOADING.writing else nn.Linear(3, 3)

    class Hub:
        def repo_exists(self, name: str) -> bool:
            return False

    monkeypatch.setattr(auto_factory, "hf_api", Hub)
    monkeypatch.setattr(AutoBackbone, "_load_timm_backbone_from_pretrained", classmethod(builds))
    assert wl.from_pretrained(AutoBackbone, "resnet18", use_timm_backbone=True).in_features == 2


def test_layers_for_further_tokens_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(model: Any) -> None:
        raise EOFError("alone" if LOADING.writing else "beside others")

    monkeypatch.setattr(MtpModel, "get_mtp_weights_regex", staticmethod(alone))
    with pytest.raises(EOFError, match="alone"):
        wl.from_pretrained(MtpModel, BertModel(BertConfig(**SMALL)))
