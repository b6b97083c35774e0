"""Folders of pipelines and options made up at random: ``from_pretrained`` gives what the original gives.

By `weightlift.from_pretrained`, or by the pipeline's own after `weightlift.install`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from tests.parity import made_pipelines as made
from tests.parity.diffusers_compare import pipeline_differences
from tests.parity.outcome import AMBIENT, drop_in, outcome_of
from tests.property.search import few
from transformers.utils import logging as transformers_logging

import weightlift as wl

MARKED = ("fp16", "fp16 too", "fp16 too", "fp16 bin", "fp16 sharded")
CHANGES = (*MARKED, *MARKED, "sharded", "sharded", "bin", "bin", "subfolder gone", "no config", "no weights",
           "truncated", "another file", "a file without a dot", "add", "add", "cast", "cast all", "drop",
           "misshape")  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float64, {"vae": torch.float16, "default": torch.bfloat16})
INDEX = ("nulled", "dropped", "added", "no such class", "no such library", "other scheduler", "unknown setting",
         "no class name", "other class", "own", "own", "own calling super", "own calling super")  # fmt: skip
OPTIONS: list[tuple[str, Any]] = [
    *[(name, value) for name in ("torch_dtype", "dtype") for value in (
        torch.bfloat16, torch.float16, torch.float64, "float16", "auto", None, {"unet": torch.bfloat16},
        {"vae": torch.float16, "default": torch.bfloat16}, {"text_encoder": "float16", "default": torch.float32})],
    *[("variant", value) for value in ("fp16", "fp16", "fp16", "ema", None, "")],
    *[("use_safetensors", value) for value in (True, False, None)],
    *[("low_cpu_mem_usage", value) for value in (True, False, False, None)],
    *[("device_map", value) for value in ("cpu", "cpu", "balanced", "auto", {"": "cpu"}, None)],
    *[(name, None) for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker",
                                "text_encoder_2", "transformer", "feature_extractor", "transformer_2")],
    *[(name, "scheduler") for name in ("unet", "scheduler", "scheduler")],
    *[(name, "model") for name in ("unet", "vae", "transformer", "text_encoder", "image_encoder", "scheduler")],
    ("vae", "path"),
    *[("custom_pipeline", value) for value in ("file", "folder", "within", "nonsense")],
    *[("trust_remote_code", value) for value in (True, True, False)],
    ("requires_safety_checker", False),
    ("force_zeros_for_empty_prompt", True),
    ("boundary_ratio", None),
    ("expand_timesteps", True),
    ("unknown", 1),
    ("output_loading_info", True),
    ("ignore_mismatched_sizes", True),
    ("attn_implementation", "eager"),
    ("disable_mmap", True),
    ("quantization_config", None),
    ("quantization_config", "nonsense"),
    ("max_memory", {"cpu": "1GB"}),
    ("offload_folder", "offloaded"),
    ("local_files_only", True),
    ("revision", "main"),
    ("custom_revision", "main"),
    ("subfolder", "unet"),
    ("cache_dir", "nowhere"),
    ("token", None),
    ("provider", "nobody"),
    ("return_unused_kwargs", True),
]  # fmt: skip
SIBLINGS = {
    "stable diffusion": diffusers.StableDiffusionImg2ImgPipeline,
    "without checker": diffusers.StableDiffusionInpaintPipeline,
    "controlled": diffusers.StableDiffusionPipeline,
    "xl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "flux": diffusers.FluxImg2ImgPipeline,
    "wan": diffusers.WanImageToVideoPipeline,
    "unconditional": diffusers.DDIMPipeline,
    "of classes": diffusers.DDPMPipeline,
    "nested": made.Nested,
}
CLASSES = ("DiffusionPipeline", "DiffusionPipeline", "its own", "sibling", "auto", "subclass", "calling super")
number = st.integers(0, 60)


@dataclass(frozen=True)
class Case:
    """A pipeline's folder, and what it is loaded with."""

    pipeline: str
    changes: tuple[tuple[str, int, int, int], ...]
    index: tuple[tuple[str, int], ...]
    cls: str
    installed: bool
    ambient: str
    first: str
    dtype: Any
    then: str
    options: tuple[tuple[str, Any], ...]


cases = st.builds(
    Case,
    pipeline=st.sampled_from(sorted(made.PIPELINES)),
    changes=st.lists(st.tuples(st.sampled_from(CHANGES), number, number, number), max_size=3).map(tuple),
    index=st.lists(st.tuples(st.sampled_from(INDEX), number), max_size=2).flatmap(
        lambda items: st.sampled_from([(), tuple(items)])
    ),
    cls=st.sampled_from(CLASSES),
    installed=st.booleans(),
    ambient=st.sampled_from(["", "", *AMBIENT]),
    first=st.sampled_from(["path", *["text"] * 6, "slash", "absent", "by name"]),
    dtype=st.sampled_from([None, None, None, *DTYPES]),
    then=st.sampled_from(["", "", "from_pipe", "from_pipe", "cast", "saved"]),
    options=st.lists(st.sampled_from(OPTIONS), max_size=3).map(tuple),
)

CUSTOM = "from {1} import {0}\n\nclass Custom({0}):\n    extra = 'custom'\n"


def prepare(case, folder):
    """Write the pipeline's folder; the class to load with."""
    place = folder / "pipeline"
    shutil.copytree(made.saved(case.pipeline), place)
    name = json.loads((place / "model_index.json").read_text())["_class_name"]
    own = getattr(diffusers, name, made.Nested)
    for how, at in case.index:
        made.reindexed(place, how, at)
    for how, at, one, two in case.changes:
        parts = made.parts_of(place)
        if parts:
            made.changed(place, parts[at % len(parts)], how, one, two)
    (folder / "custom").mkdir()
    for file in (folder / "custom" / "pipeline.py", place / "within.py"):
        file.write_text(CUSTOM.format(name, made.__name__ if own is made.Nested else "diffusers"))
    sibling = SIBLINGS[case.pipeline]
    calling = {"from_pretrained": classmethod(_calling_super)}
    return {
        "its own": own,
        "sibling": sibling,
        "auto": diffusers.AutoPipelineForImage2Image,
        "subclass": type("Sub", (own,), {"__module__": __name__}),
        "calling super": type("Calling", (own,), {"__module__": __name__, **calling}),
    }.get(case.cls, DiffusionPipeline)


def _calling_super(cls, *args, **kwargs):
    loaded = super(cls, cls).from_pretrained(*args, **kwargs)
    loaded.touched = True
    return loaded


def options_of(case, folder):
    """(first argument, keyword arguments)."""
    place = folder / "pipeline"
    name = {"path": place, "slash": f"{place}/", "absent": str(folder / "absent")}.get(case.first, str(place))
    given = {} if case.dtype is None else {"torch_dtype": case.dtype}
    if any(how in MARKED for how, *_ in case.changes):  # half of the loads ask for what there is
        given |= {"variant": "fp16"} if case.changes[0][1] % 2 else {}
    given |= dict(case.options)
    if "dtype" in given:
        given.pop("torch_dtype", None)
    for key, value in given.items():
        if value == "scheduler":
            given[key] = diffusers.EulerDiscreteScheduler()
        elif value == "model" and isinstance(value, str):
            given[key] = torch.nn.Linear(2, 2) if key == "image_encoder" else made._vae()
        elif value == "path":
            given[key] = str(place / key)
    custom = {"file": folder / "custom" / "pipeline.py", "folder": folder / "custom"}
    if given.get("custom_pipeline") in custom:
        given["custom_pipeline"] = str(custom[given["custom_pipeline"]])
    if case.first == "by name":
        key = "pretrained_model_or_path" if case.cls == "auto" else "pretrained_model_name_or_path"
        return None, {key: name, **given}
    return name, given


def load(case, cls, name, given, ours, folder):
    """The pipeline, and what is made of it."""
    first = () if name is None else (name,)
    with AMBIENT[case.ambient](), drop_in() if ours and case.installed else contextlib.nullcontext():
        if ours and not case.installed:
            pipe = wl.from_pretrained(cls, *first, **given)
        else:
            pipe = cls.from_pretrained(*first, **given)
        if case.then == "from_pipe" and isinstance(pipe, DiffusionPipeline):
            return SIBLINGS[case.pipeline].from_pipe(pipe), pipe
        if case.then == "cast":
            return pipe.to(torch.float16), None
        if case.then == "saved":
            pipe.save_pretrained(folder / f"again-{ours}")
        return pipe, None


def faults(case, folder):
    """What differs for a case."""
    cls = prepare(case, folder)
    before = _attributes()
    outcomes = []
    for ours in (False, True):
        transformers_logging.warning_once.cache_clear()
        torch.manual_seed(5)
        given = options_of(case, folder)  # anew, because pipelines write to schedulers
        outcomes.append(outcome_of(functools.partial(load, case, cls, *given, ours, folder), "diffusers", folder))
        assert torch.get_default_dtype() is torch.float32
    theirs, ours = outcomes
    assert before == _attributes()
    if theirs.error is not None or ours.error is not None:
        return errors_differ(ours, theirs)
    missing = any(how in ("drop", "misshape") for how, *_ in case.changes)
    found = differ(ours.model, theirs.model, missing)
    if (ours.info is None) != (theirs.info is None):
        found.append(f"from_pipe: {ours.info} for {theirs.info}")
    elif ours.info is not None:
        found += [f"before from_pipe: {text}" for text in differ(ours.info, theirs.info, missing)]
    for outcome in outcomes:
        outcome.said = {text: count for text, count in outcome.said.items() if "unclosed" not in text}
    if ours.said != theirs.said:
        found.append(f"said {ours.said} for {theirs.said}")
    if (folder / "again-True").exists() and not missing:
        found += files_differ(folder / "again-True", folder / "again-False")
    return found + [text for text in ours.fell_back if not _meant(case, text)]


def _attributes():
    return [vars(item).copy() for item in (torch.nn.init, torch.nn.Module, transformers.PreTrainedModel,
                                           diffusers.ModelMixin, DiffusionPipeline, diffusers.AutoModel)]  # fmt: skip


def _meant(case, text):
    reasons = ("from_pretrained of its own", "balanced", "connected pipelines")
    return any(reason in text for reason in reasons)


# Classes of components are looked up before anything is loaded; in Diffusers each before its component.
REFUSED_FIRST = ("has no class `Nonsense`", "is not one of the libraries", "contains custom code in own_code.py")


def errors_differ(ours, theirs):
    if isinstance(theirs.error, NotImplementedError) and "meta tensor" in str(theirs.error):
        return []  # where weights are missing
    if theirs.error is None or ours.error is None:
        return [f"{ours.error!r} for {theirs.error!r}"]
    if isinstance(ours.error, type(theirs.error)) or any(text in str(ours.error) for text in REFUSED_FIRST):
        return []
    return [f"{ours.error!r} for {theirs.error!r}"]


def differ(ours, theirs, missing):
    """What differs between two pipelines."""
    found = [text for text in pipeline_differences(ours, theirs) if not _same_code(text)]
    if missing:
        left = ": values", "device cpu for meta", "device: cpu for meta"  # Diffusers leaves them as they are
        found = [text for text in found if not text.endswith(left)]
    if {*vars(ours)} != {*vars(theirs)}:
        found.append(f"attributes {set(vars(ours)) ^ set(vars(theirs))}")
    found += [
        f"attribute {key}: {vars(ours).get(key)} for {value}" for key, value in vars(theirs).items()
        if isinstance(value, (bool, int, float, str, tuple, type(None))) and vars(ours).get(key) != value
    ]  # fmt: skip
    for name, part in theirs.components.items():
        mine = ours.components.get(name)
        if isinstance(part, DiffusionPipeline) and isinstance(mine, DiffusionPipeline):
            found += [f"{name}: {text}" for text in differ(mine, part, missing)]
        if not isinstance(part, torch.nn.Module) or not isinstance(mine, torch.nn.Module):
            continue
        modules = dict(mine.named_modules(remove_duplicate=False))
        for at, module in part.named_modules(remove_duplicate=False):
            other = modules.get(at)
            if other is not None and ({*vars(other)} ^ {*vars(module)}) - {"_is_hf_initialized"}:
                found.append(f"{name}.{at}: attributes {set(vars(other)) ^ set(vars(module))}")
            if type(getattr(other, "_hf_hook", None)) is not type(getattr(module, "_hf_hook", None)):
                found.append(f"{name}.{at}: hook")
    return found


def _same_code(text):
    """True for what differs because a file of code is run anew for each load."""
    return any(f"a {name} for a {name}" in text for name in ("Custom", "Mine"))


def files_differ(ours, theirs):
    names = [sorted(str(file.relative_to(place)) for file in place.rglob("*")) for place in (ours, theirs)]
    if names[0] != names[1]:
        return [f"files {set(names[0]) ^ set(names[1])}"]
    return [
        f"file {name}" for name in names[0]
        if (ours / name).is_file() and (ours / name).read_bytes() != (theirs / name).read_bytes()
    ]  # fmt: skip


@few(20)
@given(cases)
def test_pipelines(quiet_bars, no_bars, own_modules, case):
    with tempfile.TemporaryDirectory() as folder:
        found = faults(case, Path(folder))
        assert not found, "\n".join([repr(case), *found])
