"""Checkpoints of Transformers and options made up at random: ``from_pretrained`` gives what the original gives.

Of what is missing and random, the distribution; of the messages, all but those of ties, which are in words of our own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests.parity.altered import FORMS, altered, as_saved, untied, write
from tests.parity.compare import differences, named
from tests.parity.families import FAMILIES, saved
from tests.parity.missing import alike, poisoned
from tests.parity.outcome import AMBIENT as SET_BEFORE
from tests.parity.outcome import drop_in, outcome_of
from tests.property.search import few
from transformers.utils import logging as transformers_logging

import weightlift as wl
from weightlift.errors import CheckpointError, TransferError

number = st.integers(0, 60)
STEPS = ("drop", "drop", "drop alike", "add", "misshape", "cast", "cast all", "prefix", "unprefix", "legacy", "turn",
         "share")  # fmt: skip
OPTIONS: list[tuple[str, Any]] = [
    *[("dtype", value) for value in ("auto", "bfloat16", torch.float16, torch.float64, torch.int8, "nonsense", None)],
    *[("torch_dtype", value) for value in (torch.bfloat16, "float32")],
    ("dtype", {"": torch.bfloat16, "text_config": torch.float32}),
    *[("device_map", value) for value in ("cpu", "auto", {"": "cpu"}, torch.device("cpu"), "disk", "nowhere")],
    ("device_map", "one on disk"),
    ("max_memory", {"cpu": "1GB"}),
    ("ignore_mismatched_sizes", True),
    ("ignore_mismatched_sizes", True),
    ("key_mapping", {"^other.": ""}),
    ("key_mapping", {r"^encoder\.": "enc.", "weight$": "weight"}),
    *[("attn_implementation", value) for value in ("eager", "sdpa", "nonsense")],
    *[("use_safetensors", value) for value in (True, False)],
    ("variant", "fp16"),
    ("revision", "main"),
    ("local_files_only", True),
    *[("low_cpu_mem_usage", value) for value in (True, False)],
    ("trust_remote_code", True),
    ("weights_only", False),
    ("disable_mmap", True),
    *[("tie_word_embeddings", value) for value in (True, False)],
    ("output_attentions", True),
    ("num_labels", 5),
    ("hidden_dropout_prob", 0.25),
    ("vocab_size", 44),
    ("scale", 3.0),
    ("unknown", 1),
    ("config", "path"),
    ("config", "object"),
    ("config", "other dtype"),
    ("state_dict", "alone"),
    ("state_dict", "and a name"),
    ("tp_plan", None),
    ("quantization_config", None),
    ("from_tf", True),
    ("_fast_init", True),
    ("generation_config", transformers.GenerationConfig(max_new_tokens=7)),
    ("subfolder", "within"),
]  # fmt: skip


AMBIENT = {**SET_BEFORE, "on meta": lambda: torch.device("meta"), "inference": torch.inference_mode}


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what it is loaded with."""

    family: str
    source: int
    target: int
    merged: bool
    ties: str
    steps: tuple[tuple[str, int, int], ...]
    form: str
    variant: str | None
    subfolder: str
    config_dtype: str | None
    config_fields: dict[str, Any]
    with_generation: bool
    auto: bool
    ambient: str
    first: str
    installed: bool
    options: tuple[tuple[str, Any], ...]


cases = st.builds(
    Case,
    family=st.sampled_from(sorted(FAMILIES)),
    source=st.sampled_from([0, 0, 1, 2]),
    target=st.sampled_from([0, 0, 0, 1, 2, 3]),
    merged=st.booleans(),
    ties=st.sampled_from(["first", "first", "last", "both", "neither", "differ"]),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), number, number), max_size=3).map(tuple),
    form=st.sampled_from(FORMS),
    variant=st.sampled_from([None, None, None, "fp16"]),
    subfolder=st.sampled_from(["", "", "", "within"]),
    config_dtype=st.sampled_from([None, None, "float32", "bfloat16", "float16"]),
    config_fields=st.sampled_from(
        [{}, {}, {}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"architectures": None},
         {"architectures": ["Nonsense"]}, {"return_dict": False}, {"unknown": 3}]
    ),
    with_generation=st.booleans(),
    auto=st.sampled_from([False, False, True]),
    ambient=st.sampled_from(["", "", "", *AMBIENT]),
    first=st.sampled_from(["path", "path", "path", "text", "slash", "absent", "file", "no weights"]),
    installed=st.booleans(),
    options=st.lists(st.sampled_from(OPTIONS), max_size=3).map(tuple),
)  # fmt: skip


def prepare(case, folder):
    """Write the checkpoint. Returns the class to load with, and the state dict."""
    family = FAMILIES[case.family]
    cls = family.classes[case.target % len(family.classes)]
    source = case.source % len(family.classes)
    if family.classes[source].config_class is not cls.config_class:
        source = 0  # of a part's configuration the whole would be of the default size
    config, state = saved(case.family, source)
    model = family.classes[source](config)
    model.load_state_dict(state)
    ties = list(model.all_tied_weights_keys.items())
    if not case.merged and case.family not in ("odd",):
        state = {**as_saved(model, folder / "aside"), **{target: state[source] for target, source in ties}}
    state = altered(untied(state, ties, case.ties), case.steps, model.base_model_prefix or "model")
    place = folder / "checkpoint"
    write(state, place / case.subfolder, case.form, case.variant)
    config.dtype = case.config_dtype
    for key, value in case.config_fields.items():
        setattr(config, key, value)
    config.save_pretrained(place / case.subfolder)
    generation = place / case.subfolder / "generation_config.json"
    if case.with_generation:
        generation.write_text('{"temperature": 0.5, "do_sample": true, "max_length": 19}')
    if case.first == "no weights":
        for file in (place / case.subfolder).glob("*model*"):
            file.unlink()
            file.touch()
    return (family.auto if case.auto and family.auto else cls), state


def options_of(case, cls, state, folder, who):
    """(first argument, keyword arguments)."""
    name = folder / "checkpoint"
    name = {"text": str(name), "slash": f"{name}/", "absent": str(folder / "absent"),
            "file": next((name / case.subfolder).glob("*model*"))}.get(case.first, name)  # fmt: skip
    given = {"variant": case.variant, "subfolder": case.subfolder}
    given = {key: value for key, value in given.items() if value} | dict(case.options)
    if given.get("device_map") in ("disk", "one on disk"):
        given["offload_folder"] = folder / f"offloaded-{who}"
    if given.get("device_map") == "disk":
        given["device_map"] = {"": "disk"}
    elif given.get("device_map") == "one on disk":
        model_class = cls if hasattr(cls, "config_class") else FAMILIES[case.family].classes[0]
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_pretrained(name, subfolder=case.subfolder))
        names = [part for part, _ in model.named_children()]
        given["device_map"] = {part: "disk" if at == 0 else "cpu" for at, part in enumerate(names)}
    if "config" in given:
        kind = given["config"]
        where = folder / "checkpoint" / case.subfolder
        config_class = getattr(cls, "config_class", None) or type(FAMILIES[case.family].config())
        given["config"] = where if kind == "path" else config_class.from_pretrained(where)
        if kind == "other dtype":
            given["config"].dtype = torch.bfloat16
    if "state_dict" in given:
        if given["state_dict"] == "alone":
            given.setdefault("config", FAMILIES[case.family].config())
            name = None
        given["state_dict"] = {key: value.clone() for key, value in state.items()}
    return name, {**given, "output_loading_info": True}


def load(cls, name, given, by, ambient):
    """The model and its loading info: by the original, by ours, or by ours in the original's place."""
    config, state = copy.deepcopy(given.get("config")), dict(given.get("state_dict") or {})
    with AMBIENT[ambient](), drop_in() if by == "installed" else contextlib.nullcontext():
        made = wl.from_pretrained(cls, name, **given) if by == "ours" else cls.from_pretrained(name, **given)
    if hasattr(config, "to_dict"):
        assert config.to_dict() == given["config"].to_dict()
    assert list(state) == list(given.get("state_dict") or {})
    return made


def forward(model, inputs):
    """The numbers that a model gives, or the error."""
    known = inspect.signature(model.forward).parameters
    given = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in inputs.items() if key in known
    }  # fmt: skip
    try:
        with torch.no_grad():
            made = model(**given)
    except Exception as error:
        return type(error), str(error)
    values = made.values() if hasattr(made, "values") else made
    return [item for item in values if isinstance(item, torch.Tensor)]


def same(ours, theirs):
    if isinstance(ours, tuple) or isinstance(theirs, tuple):
        return ours == theirs
    return len(ours) == len(theirs) and all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(ours, theirs)
    )


def values_differ(name, ours, first, second):
    """What is wrong with a tensor that the other library gave as ``first``, and with another seed as ``second``."""
    if ours.is_meta or first.is_meta:
        return None
    if not first.dtype.is_floating_point and bool((first == _POISON.get(first.dtype, 0)).all()):
        return None  # not initialised
    if torch.equal(first, second):
        return None if torch.equal(ours, first) else f"{name}: values {ours.flatten()[:4]} for {first.flatten()[:4]}"
    if first.isnan().any() or second.isnan().any():
        return f"{name}: nan" if ours.isnan().any() else None
    what = alike(ours, first)
    return what and f"{name}: {what}"


_POISON = {torch.bool: True, torch.int64: torch.iinfo(torch.int64).max}
MEANT = ("weights_only=False", "a tie that is on disk in part", "share memory", "meta device")


def compare(ours, theirs, again, inputs):
    """What differs between two loads."""
    if theirs.error is not None or ours.error is not None:
        if theirs.error is None:
            return [f"only ours fails: {ours.error!r}"]
        if ours.error is None:
            return [f"only theirs fails: {theirs.error!r}"]
        if isinstance(ours.error, (CheckpointError, TransferError, type(theirs.error))):
            return []
        return [f"{type(ours.error).__mro__}: {ours.error} for {theirs.error!r}"]
    found = differences(ours.model, theirs.model, values=False)
    mine, first, second = (named(item.model) for item in (ours, theirs, again))
    found += [
        what for name in mine if name in first and mine[name].shape == first[name].shape
        if (what := values_differ(name, mine[name], first[name], second[name]))
    ]  # fmt: skip
    if ours.info != theirs.info:
        found.append(f"info: {ours.info} for {theirs.info}")
    said = (ours.said - theirs.said) + (theirs.said - ours.said)
    found += [f"only one said: {text}" for text in said if not {"tied", "mapping"} <= set(text.split())]
    for name in ("generation_config", "hf_device_map", "name_or_path", "can_generate", "is_parallelizable",
                 "built_with", "_weight_conversions"):  # fmt: skip
        a, b = (getattr(item.model, name, None) for item in (ours, theirs))
        if name == "_weight_conversions":
            a, b = repr(a), repr(b)
        if not callable(a) and a != b:
            found.append(f"{name}: {a} for {b}")
    a, b = (set(vars(item.model)) for item in (ours, theirs))
    if a != b:
        found.append(f"attributes: {a - b} for {b - a}")
    if not found:
        found += attributes_differ(ours.model, theirs.model)
        found += forwards_differ(ours.model, theirs.model, inputs)
    return found


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


def attributes_differ(ours, theirs):
    """What differs of the plain attributes of the modules, and of the names of others."""
    found = []
    mine = dict(ours.named_modules(remove_duplicate=False))
    for name, module in theirs.named_modules(remove_duplicate=False):
        a, b = vars(mine[name]), vars(module)
        for key in a.keys() | b.keys():
            if key == "_is_hf_initialized":
                continue
            if key not in a or key not in b or type(a[key]) is not type(b[key]):
                found.append(f"{name}: attribute {key}: {a.get(key, 'none')!r:.90} for {b.get(key, 'none')!r:.90}")
            elif isinstance(b[key], _PLAIN) and a[key] != b[key]:
                found.append(f"{name}: attribute {key}: {a[key]} for {b[key]}")
            elif isinstance(b[key], (dict, list, tuple, set)) and len(a[key]) != len(b[key]):
                found.append(f"{name}: attribute {key}: {a[key]!r:.200} for {b[key]!r:.200}")
    parameters = dict(theirs.named_parameters(remove_duplicate=False))
    for name, parameter in ours.named_parameters(remove_duplicate=False):
        a, b = (set(vars(item)) - {"_is_hf_initialized"} for item in (parameter, parameters[name]))
        if a != b:
            found.append(f"{name}: attributes of the parameter {a} for {b}")
        if parameter.is_inference():
            found.append(f"{name}: inference")
    return found


def forwards_differ(ours, theirs, inputs):
    state = theirs.state_dict()
    if not any(value.is_meta for value in state.values()):
        ours.load_state_dict(state)
    a, b = forward(ours, inputs), forward(theirs, inputs)
    if isinstance(b, tuple) and b[0] is KeyError and "disk" in (getattr(theirs, "hf_device_map", None) or {}).values():
        return []  # what the files lack is not written for accelerate's hooks there
    return [] if same(a, b) else [f"forward: {a} for {b}"]


def faults(case, folder):
    """What differs for a case."""
    cls, state = prepare(case, folder)
    outcomes = []
    before = vars(torch.nn.init).copy(), vars(torch.nn.Module).copy(), vars(transformers.PreTrainedModel).copy()
    for by, seed in (("theirs", 1), ("theirs", 2), ("installed" if case.installed else "ours", 3)):
        torch.manual_seed(seed)
        try:
            name, given = options_of(case, cls, state, folder, f"{by}{seed}")
        except Exception:
            return []
        transformers_logging.warning_once.cache_clear()
        loading = functools.partial(load, cls, name, given, by, case.ambient)
        with poisoned() if by == "theirs" else contextlib.nullcontext():
            outcomes.append(outcome_of(loading, "transformers", folder))
    theirs, again, ours = outcomes
    found = compare(ours, theirs, again, FAMILIES[case.family].inputs)
    if ours.error is None:
        if any(name in ("turn", "share") for name, _, _ in case.steps):
            found = [text for text in found if ": strides" not in text]
        if "disk" in str(case.options) and ours.info["mismatched_keys"]:  # there they are not noticed
            found = [text for text in found if "ismatch" not in text and not text.startswith(("ties", "only one said"))]
        if "disk" in str(case.options) and ours.info["missing_keys"]:  # untied there, and without a value
            found = [text for text in found if not text.startswith("ties")]
        found += [text for text in ours.fell_back if not any(reason in text for reason in MEANT)]
    assert torch.get_default_dtype() is torch.float32
    assert before == (vars(torch.nn.init), vars(torch.nn.Module), vars(transformers.PreTrainedModel))
    return found


@few(40)
@given(cases)
def test_transformers(quiet_bars, case):
    with tempfile.TemporaryDirectory() as folder:
        found = faults(case, Path(folder))
        assert not found, "\n".join([repr(case), *found])
