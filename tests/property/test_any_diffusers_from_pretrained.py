"""Checkpoints of Diffusers and options made up at random: ``from_pretrained`` gives what the original gives."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.parity.altered import FORMS, altered
from tests.parity.compare import differences, named
from tests.parity.diffusers_compare import same_info
from tests.parity.outcome import AMBIENT, outcome_of
from tests.property.search import few

import weightlift as wl

BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
MODELS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {**BLOCKS, "sample_size": 8, "attention_head_dim": 4,
                    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                    "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    "UNet2DConditionModel": {**BLOCKS, "sample_size": 8, "attention_head_dim": 4, "cross_attention_dim": 16,
                             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    "AutoencoderKL": {**BLOCKS, "down_block_types": ("DownEncoderBlock2D",) * 2,
                      "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 2},
    "DiTTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4,
                              "in_channels": 2, "norm_num_groups": 2},
    "T2IAdapter": {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 8},
    "WanTransformer3DModel": {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 2, "out_channels": 2,
                              "text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "num_layers": 1},
    "UniDiffuserTextDecoder": {"prefix_length": 4, "prefix_inner_dim": 16, "n_embd": 16, "n_layer": 1, "n_head": 2,
                               "vocab_size": 20, "n_positions": 16},
    "PriorTransformer": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "embedding_dim": 8,
                         "num_embeddings": 4, "additional_embeddings": 4},
}  # fmt: skip
STEPS = ("add", "add", "cast", "cast all", "cast all", "turn", "share", "drop", "misshape", "prefix", "legacy names")
OPTIONS: list[tuple[str, Any]] = [
    *[("torch_dtype", item) for item in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, "float16",
                                         torch.int8, "auto")],
    *[("dtype", item) for item in (torch.bfloat16, torch.float32)],
    *[("device_map", item) for item in ("cpu", "auto", {"": "cpu"}, torch.device("cpu"), "nowhere", "balanced")],
    *[("low_cpu_mem_usage", item) for item in (True, False, False, None)],
    ("ignore_mismatched_sizes", True),
    ("ignore_mismatched_sizes", True),
    *[("use_safetensors", item) for item in (True, False, None)],
    *[("variant", None), ("subfolder", None)],
    ("disable_mmap", True),
    ("max_memory", {"cpu": "1GB"}),
    ("local_files_only", True),
    ("revision", None),
    ("unknown", 1),
    ("sample_size", 16),
    ("in_channels", 4),
    ("num_layers", 2),
    ("quantization_config", None),
    ("return_unused_kwargs", False),
    ("offload_folder", "offloaded"),
    ("output_loading_info", True),
]
number = st.integers(0, 60)


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what it is loaded with."""

    model: str
    steps: tuple[tuple[str, int, int], ...]
    form: str
    variant: str | None
    subfolder: str
    auto: bool
    ambient: str
    options: tuple[tuple[str, Any], ...]


cases = st.builds(
    Case,
    model=st.sampled_from(sorted(MODELS)),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), number, number), max_size=3).map(tuple),
    form=st.sampled_from(FORMS),
    variant=st.sampled_from([None, None, None, "fp16"]),
    subfolder=st.sampled_from(["", "", "", "within"]),
    auto=st.sampled_from([False, False, True]),
    ambient=st.sampled_from(["", "", *AMBIENT]),
    options=st.lists(st.sampled_from(OPTIONS), max_size=3).map(tuple),
)
OLD = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


@functools.cache
def _saved(name):
    torch.manual_seed(3)
    model = getattr(diffusers, name)(**MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model, {key: value.detach().clone() for key, value in model.state_dict().items()}


def write(state, folder, form, variant):
    """The state dict as files of a form, by the names of Diffusers."""
    stem = "diffusion_pytorch_model"
    marked = f"{stem}.{variant}" if variant else stem
    solid = {key: value.clone().contiguous() for key, value in state.items()}
    if form in ("safetensors", "plain", "both"):
        save_file(solid, folder / f"{marked}.safetensors", None if form == "plain" else {"format": "pt"})
    if form in ("bin", "both"):
        torch.save(state, folder / f"{marked}.bin")
    if form.startswith("sharded"):
        end = "safetensors" if form == "sharded" else "bin"
        files = {}
        for at in range(3):
            part = {key: value for place, (key, value) in enumerate(state.items()) if place % 3 == at}
            file = f"{marked}-0000{at + 1}-of-00003.{end}"
            if end == "bin":
                torch.save(part, folder / file)
            else:
                save_file({key: solid[key] for key in part}, folder / file, {"format": "pt"})
            files.update(dict.fromkeys(part, file))
        index = f"{stem}.{end}.index" + (f".{variant}" if variant else "") + ".json"
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


def prepare(case, folder):
    """Write the checkpoint; the class to load with."""
    model, state = _saved(case.model)
    plain = tuple(step for step in case.steps if step[0] != "legacy names")
    state = altered(dict(state), plain, "model")
    if len(plain) < len(case.steps):
        for new, old in OLD.items():
            state = {key.replace(new, old): value for key, value in state.items()}
    place = folder / "checkpoint" / case.subfolder
    model.save_config(place)
    write(state, place, case.form, case.variant)
    return diffusers.AutoModel if case.auto else type(model)


def faults(case, folder):
    """What differs for a case."""
    cls = prepare(case, folder)
    given = {"variant": case.variant, "subfolder": case.subfolder}
    given = {key: value for key, value in given.items() if value} | dict(case.options)
    given["output_loading_info"] = True
    name = str(folder / "checkpoint") if case.auto else folder / "checkpoint"
    before = vars(torch.nn.init).copy(), vars(torch.nn.Module).copy()
    theirs, ours = (outcome_of(functools.partial(load, cls, name, given, by, case.ambient), "diffusers", folder)
                    for by in ("theirs", "ours"))  # fmt: skip
    assert torch.get_default_dtype() is torch.float32
    assert before == (vars(torch.nn.init), vars(torch.nn.Module))
    if isinstance(theirs.error, NotImplementedError) and "meta tensor" in str(theirs.error):
        return []  # where weights are missing
    if theirs.error is not None or ours.error is not None:
        alike = theirs.error is not None and isinstance(ours.error, type(theirs.error))
        return [] if alike else [f"{ours.error!r} for {theirs.error!r}"]
    return differ(case, ours, theirs) + ours.fell_back


def load(cls, name, given, by, ambient):
    """The model and its loading info, by one or the other."""
    with AMBIENT[ambient]():
        return cls.from_pretrained(name, **given) if by == "theirs" else wl.from_pretrained(cls, name, **given)


def differ(case, ours, theirs):
    """What differs between two models, but for what is missing, which Diffusers leaves without values."""
    missing = {*theirs.info["missing_keys"], *(item[0] for item in theirs.info["mismatched_keys"])}
    found = differences(ours.model, theirs.model, values=False)
    if not same_info(ours.info, theirs.info):
        found.append(f"info {ours.info} for {theirs.info}")
    if ours.said != theirs.said:
        found.append(f"said {ours.said - theirs.said} for {theirs.said - ours.said}")
    mine = named(ours.model)
    for key, value in named(theirs.model).items():
        if key not in missing and key in mine and value.shape == mine[key].shape and not value.is_meta:
            a, b = mine[key].float(), value.float()
            if not torch.equal(a.nan_to_num(7), b.nan_to_num(7)):
                found.append(f"{key}: values")
    if case.model == "UniDiffuserTextDecoder":
        found = [text for text in found if not text.startswith("ties")]
    found = [text for text in found if not any(text.startswith(f"{key}: ") for key in missing)]
    for key in ("hf_device_map", "name_or_path", "_hf_hook", "_hf_peft_config_loaded"):
        a, b = getattr(ours.model, key, None), getattr(theirs.model, key, None)
        if (a != b and key != "_hf_hook") or type(a) is not type(b):
            found.append(f"{key}: {a} for {b}")
    if {*vars(ours.model)} != {*vars(theirs.model)}:
        found.append(f"attributes {set(vars(ours.model)) ^ set(vars(theirs.model))}")
    return found


@few(60)
@given(cases)
def test_diffusers(no_bars, case):
    with tempfile.TemporaryDirectory() as folder:
        found = faults(case, Path(folder))
        assert not found, "\n".join([repr(case), *found])
