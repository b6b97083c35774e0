"""What ``from_pretrained`` takes means the same through weightlift; what is missing, extra or of another shape is told
as Transformers tells it."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity.compare import FellBack, both, differences, named, native_only
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import weightlift as wl

_TELL_OF_PLANS = ("modeling_utils", "distributed.tensor_parallel")
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": "auto"},
    {"dtype": torch.bfloat16},
    {"torch_dtype": "float16"},
    {"device_map": "cpu"},
    {"device_map": {"": "cpu"}},
    {"device_map": "auto"},
    {"device_map": {"model": "cpu", "lm_head": "cpu"}},
    {"attn_implementation": "eager"},
    {"use_safetensors": True},
    {"disable_mmap": True},
    {"low_cpu_mem_usage": True},
    {"local_files_only": True},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_means_the_same(llama: Path, options: dict[str, Any]) -> None:
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, llama, **options)
    values = options != {"tie_word_embeddings": False}  # the head is missing then, and random
    assert differences(ours, theirs, values=values) == []
    assert info == expected
    assert ours.generation_config == theirs.generation_config
    assert getattr(ours, "hf_device_map", None) == getattr(theirs, "hf_device_map", None)


META: list[Any] = ["meta", torch.device("meta"), {"": "meta"}, {"model": "meta", "lm_head": "cpu"}]


@pytest.mark.parametrize("places", META, ids=str)
def test_the_meta_device_is_left_to_transformers(llama: Path, places: Any) -> None:
    with pytest.raises(FellBack, match="meta device"), native_only():
        ours = wl.from_pretrained(LlamaForCausalLM, llama, device_map=places)
    theirs = LlamaForCausalLM.from_pretrained(llama, device_map=places)
    assert differences(ours, theirs, values=False) == []
    assert [p.device for p in ours.parameters()] == [p.device for p in theirs.parameters()]


def test_a_device_map_whose_keys_are_no_names(llama: Path) -> None:
    with pytest.raises(TypeError, match=r"device_map: expected names of modules as keys, found 0 \(a int\); map names"):
        wl.from_pretrained(AutoModelForCausalLM, llama, device_map={0: "cpu"})


@pytest.mark.parametrize("asked", [{"patch_embeddings": True}, {}])
def test_fusions_that_the_configuration_asks_for(llama: Path, asked: dict[str, bool]) -> None:
    config = LlamaConfig.from_pretrained(llama)
    config.fusion_config = asked
    with pytest.raises(FellBack, match="fusion_config") if asked else contextlib.nullcontext(), native_only():
        wl.from_pretrained(LlamaForCausalLM, llama, config=config)


def test_warnings_name_who_calls(bert: Path) -> None:
    with pytest.warns(FutureWarning, match="tp_plan") as found:
        wl.from_pretrained(BertModel, bert, tp_plan="auto")  # left to Transformers
    assert {item.filename for item in found} == {__file__}


def test_an_auto_class_picks_the_class(llama: Path, bert: Path) -> None:
    with native_only():
        assert type(wl.from_pretrained(AutoModelForCausalLM, llama)) is LlamaForCausalLM
        model, info = wl.from_pretrained(AutoModel, bert, dtype=torch.bfloat16, output_loading_info=True)
    assert type(model) is BertModel
    assert model.dtype == torch.bfloat16
    theirs, expected = AutoModel.from_pretrained(bert, dtype=torch.bfloat16, output_loading_info=True)
    assert info == expected
    assert set(named(model)) == set(named(theirs))


def test_other_classes_are_refused() -> None:
    with pytest.raises(TypeError, match="Transformers"):
        wl.from_pretrained(dict, "somewhere")


def test_a_configuration_and_a_state_dict(bert: Path) -> None:
    config = BertConfig.from_pretrained(bert)
    state = load_file(bert / "model.safetensors")
    theirs = BertForMaskedLM.from_pretrained(None, config=config, state_dict=dict(state))
    with native_only():
        ours = wl.from_pretrained(BertForMaskedLM, None, config=config, state_dict=state)
    assert differences(ours, theirs) == []


@pytest.mark.parametrize(("variant", "subfolder"), [("fp16", ""), (None, "inner"), ("fp16", "inner")])
def test_variant_and_subfolder(llama: Path, tmp_path: Path, variant: str | None, subfolder: str) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "there" / subfolder, variant=variant)
    (ours, _), (theirs, _) = both(LlamaForCausalLM, tmp_path / "there", variant=variant, subfolder=subfolder)
    assert differences(ours, theirs) == []


def test_a_pickle(llama: Path) -> None:
    state = load_file(llama / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # pickles hold both names of a tie
    torch.save(state, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, llama)
    assert differences(ours, theirs) == []
    assert info == expected


def test_key_mapping(llama: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[name.replace("model.", "inner.", 1)] = state.pop(name)

    rewrite(llama, change)
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, llama, key_mapping={"^inner": "model"})
    assert differences(ours, theirs) == []
    assert info == expected
    assert expected["missing_keys"] == set()


def test_a_head_on_a_base_checkpoint_and_back(bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (ours, info), (theirs, expected) = both(BertForSequenceClassification, bert)
    assert differences(ours, theirs, values=False) == []
    assert info == expected
    BertModel.from_pretrained(bert).save_pretrained(tmp_path / "base")
    (ours, info), (theirs, expected) = both(BertForMaskedLM, tmp_path / "base")
    assert differences(ours, theirs, values=False) == []
    assert info == expected
    assert expected["missing_keys"]


def test_missing_extra_and_misshapen_keys(bert: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state["bert.encoder.layer.0.output.dense.weight"]
        del state["cls.predictions.bias"]
        state["something.else"] = torch.zeros(3)
        state["bert.encoder.layer.1.output.dense.bias"] = torch.zeros(5)

    rewrite(bert, change)
    (ours, info), (theirs, expected) = both(BertForMaskedLM, bert, ignore_mismatched_sizes=True)
    assert info == expected
    assert expected["mismatched_keys"]
    assert differences(ours, theirs, values=False) == []
    assert torch.equal(ours.bert.encoder.layer[1].output.dense.bias, torch.zeros(16))
    assert 0.01 < ours.bert.encoder.layer[0].output.dense.weight.std() < 0.03
    with pytest.raises(RuntimeError, match=r"\[16\] as the model has it; found \[5\]"):
        wl.from_pretrained(BertForMaskedLM, bert)


TIES = {
    "source only": lambda state, source, target: state.update({source: state[source]}),
    "target only": lambda state, source, target: state.update({target: state.pop(source)}),
    "both, equal": lambda state, source, target: state.update({target: state[source].clone()}),
    "both, different": lambda state, source, target: state.update({target: state[source] + 1}),
}


@pytest.mark.parametrize("case", TIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_are_symmetric(llama: Path, case: str, dtype: torch.dtype) -> None:
    rewrite(llama, lambda state: TIES[case](state, "model.embed_tokens.weight", "lm_head.weight"))
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, llama, dtype=dtype)
    assert differences(ours, theirs) == []
    assert info == expected
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (case != "both, different")


@pytest.mark.parametrize("present", ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_a_tie_of_more_than_two_names(tmp_path: Path, present: str) -> None:
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=64)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state.update({present: state.pop("shared.weight")}))
    (ours, info), (theirs, expected) = both(T5ForConditionalGeneration, tmp_path)
    assert differences(ours, theirs) == []
    assert info == expected


def test_a_tie_that_the_checkpoint_lacks(llama: Path) -> None:
    rewrite(llama, lambda state: state.pop("model.embed_tokens.weight"))
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, llama)
    assert differences(ours, theirs, values=False) == []
    assert info == expected
    weight = ours.model.embed_tokens.weight
    assert 0.015 < weight.std() < 0.025
    assert bool((weight[LlamaConfig.from_pretrained(llama).pad_token_id or 0] != 0).any())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tie_of_another_shape(llama: Path, name: str) -> None:
    """Neither name is missing: the one of another shape counts as there, and the other is tied to it."""
    rewrite(llama, lambda state: state.pop("model.embed_tokens.weight"))
    rewrite(llama, lambda state: state.update({name: torch.zeros(65, 16)}))
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, llama, ignore_mismatched_sizes=True)
    if name == "model.embed_tokens.weight":  # Transformers leaves the other on meta
        assert differences(ours, theirs, values=False) == []
    assert not any(parameter.is_meta for parameter in ours.parameters())
    assert info == expected
    assert expected["missing_keys"] == set()


def test_names_that_leave_a_tie_are_alone(tmp_path: Path) -> None:
    config = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=64)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

    def other_values(state: dict[str, torch.Tensor]) -> None:
        for name in names:  # each of its own: safetensors stores no memory twice
            state[name] = state["shared.weight"] + 1

    rewrite(tmp_path, other_values)
    (ours, info), (theirs, expected) = both(T5ForConditionalGeneration, tmp_path)
    assert differences(ours, theirs) == []
    assert info == expected
    assert ours.encoder.embed_tokens.weight is not ours.decoder.embed_tokens.weight


def test_ties_that_the_caller_asks_for(llama: Path) -> None:
    config = LlamaConfig.from_pretrained(llama)
    config.tie_word_embeddings = False
    rewrite(llama, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"] + 1}))
    (ours, info), (theirs, expected) = both(LlamaForCausalLM, llama, config=config)
    assert differences(ours, theirs) == []
    assert info == expected
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight


def mixtral(folder: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(folder, max_shard_size=8000)


def test_merged_experts_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the merged tensors come from the files: no tensor is read early for them."""
    from weightlift.integrations.transformers import conversion as transformers_conversion

    mixtral(tmp_path)
    monkeypatch.setattr(transformers_conversion, "_computed", lambda *_: pytest.fail("computed"))
    (ours, info), (theirs, expected) = both(MixtralForCausalLM, tmp_path)
    assert differences(ours, theirs) == []
    assert info == expected


def test_a_converted_model_saves_as_it_was(tmp_path: Path) -> None:
    mixtral(tmp_path / "first")
    (ours, _), (theirs, _) = both(MixtralForCausalLM, tmp_path / "first")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    """The merge fails in Transformers as it does here, before anything is read."""
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state.pop(next(name for name in state if ".experts.1." in name and "w1" in name)))
    with pytest.raises(RuntimeError):
        MixtralForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        wl.from_pretrained(MixtralForCausalLM, tmp_path)


def test_a_distributed_checkpoint_goes_to_transformers(tmp_path: Path) -> None:
    """Files that torch.distributed wrote, one set a rank."""
    from transformers.distributed.checkpoint import _save_model_checkpoint_distributed

    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)).eval()
    model.config.save_pretrained(tmp_path)
    _save_model_checkpoint_distributed(model, str(tmp_path))
    with pytest.raises(FellBack, match="distributed checkpoint"), native_only():
        ours = wl.from_pretrained(LlamaForCausalLM, tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in ours.state_dict().items())


def test_an_index_that_leads_out_of_its_folder(llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(llama.parent / "sharded", max_shard_size=8000)
    index = llama.parent / "sharded" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001', '"../llama/../sharded/model-00001'))
    with pytest.raises(wl.CheckpointError, match="outside"):
        wl.from_pretrained(LlamaForCausalLM, llama.parent / "sharded")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 8),
        ({"HF_PARALLEL_LOADING_WORKERS": "3"}, 3),
        ({"HF_PARALLEL_LOADING_WORKERS": "none"}, 8),
        ({"HF_ENABLE_PARALLEL_LOADING": "yes", "HF_PARALLEL_LOADING_WORKERS": "3"}, 3),
        ({"HF_ENABLE_PARALLEL_LOADING": "true"}, 8),
        ({"HF_ENABLE_PARALLEL_LOADING": "0", "HF_PARALLEL_LOADING_WORKERS": "3"}, 1),
        ({"HF_ENABLE_PARALLEL_LOADING": "false"}, 1),
        ({"HF_DEACTIVATE_ASYNC_LOAD": "1"}, 1),
    ],
    ids=str,
)
def test_variables_say_how_many_threads_read(
    llama: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: int
) -> None:
    from weightlift.integrations.transformers import model as transformers_model

    for name in ("HF_PARALLEL_LOADING_WORKERS", "HF_ENABLE_PARALLEL_LOADING", "HF_DEACTIVATE_ASYNC_LOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    workers = []
    apply = transformers_model.apply

    def noted(load: Any) -> Any:
        workers.append(load.options.workers)
        return apply(load)

    monkeypatch.setattr(transformers_model, "apply", noted)
    (ours, _), (theirs, _) = both(LlamaForCausalLM, llama)
    assert workers == [expected]
    assert differences(ours, theirs) == []


class _Transposed(BertModel):
    """Parameters that are views: of something sampled, and of something that is computed at once."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.sampled = torch.nn.Parameter(torch.randn(2, 6).t())
        self.counted = torch.nn.Parameter(torch.arange(12.0).view(2, 6).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_parameters_that_the_constructor_makes_transposed(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = _Transposed(BertConfig(**SMALL))
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    if kind == "pickle":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        solid = {name: value.contiguous() for name, value in state.items()}
        save_file(solid, tmp_path / "model.safetensors", {"format": "pt"})
    (ours, _), (theirs, _) = both(_Transposed, tmp_path, dtype=dtype)
    assert differences(ours, theirs) == []
    assert ours.counted.is_contiguous() == ours.sampled.is_contiguous() == (kind == "safetensors")


def test_layers_without_a_tensor_parallel_plan_are_told_of(llama: Path) -> None:
    """Where the loading's own logger is quieter than its default, strange as that is."""
    logger, teller = (logging.getLogger(f"transformers.{name}") for name in _TELL_OF_PLANS)
    level = logger.level
    told: list[list[str]] = []
    watch = logging.Handler()
    watch.emit = lambda item: told.append(sorted(item.getMessage().partition(": ")[2].split(", ")))  # type: ignore
    logger.setLevel(logging.ERROR)
    teller.addHandler(watch)
    try:
        both(LlamaForCausalLM, llama)
    finally:
        teller.removeHandler(watch)
        logger.setLevel(level)
    assert len(told) == 2 and told[0] == told[1]
