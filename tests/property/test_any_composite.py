"""Models that are put together of several checkpoints, and pipelines of tasks, at random: the drop-in changes nothing.

What puts them together is Transformers' own code, which calls ``from_pretrained`` of the parts within.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from tests.parity.altered import altered, untied, write
from tests.parity.diffusers_pipelines import tokenizer
from tests.parity.families import FAMILIES, saved
from tests.parity.missing import poisoned
from tests.parity.outcome import AMBIENT, drop_in, outcome_of
from tests.property.search import few
from tests.property.test_any_from_pretrained import compare
from transformers.utils import logging as transformers_logging

PAIRS: list[tuple[Any, str]] = [
    (tf.EncoderDecoderModel, "encoder_decoder"),
    (tf.VisionEncoderDecoderModel, "encoder_decoder"),
    (tf.SpeechEncoderDecoderModel, "encoder_decoder"),
    (tf.VisionTextDualEncoderModel, "vision_text"),
]
TASKS = ("text-generation", "fill-mask", "feature-extraction", "text-classification", "token-classification",
         "image-classification", "image-feature-extraction", "automatic-speech-recognition")  # fmt: skip
PART_OPTIONS: list[tuple[str, Any]] = [
    *[("dtype", value) for value in (torch.bfloat16, "auto", "float16")],
    ("attn_implementation", "eager"),
    ("ignore_mismatched_sizes", True),
    ("hidden_dropout_prob", 0.25),
    ("is_decoder", True),
    ("device_map", "cpu"),
    ("low_cpu_mem_usage", True),
    ("use_safetensors", True),
    ("config", "object"),
    ("unknown", 3),
]
number = st.integers(0, 60)
STEPS = ("drop", "add", "misshape", "cast", "cast all")


@dataclass(frozen=True)
class Case:
    """The families of the parts, what became of their checkpoints, and what they are put together with."""

    families: tuple[str, str]
    pair: int
    task: str
    steps: tuple[tuple[str, int, int], ...]
    form: str
    ambient: str
    options: tuple[tuple[str, str, Any], ...]


cases = st.builds(
    Case,
    families=st.tuples(
        st.sampled_from(sorted(FAMILIES)), st.sampled_from(["bert", "bert", "llama", *sorted(FAMILIES)])
    ),
    pair=st.integers(0, len(PAIRS) - 1),
    task=st.sampled_from(["", *TASKS]),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), number, number), max_size=2).map(tuple),
    form=st.sampled_from(["safetensors", "sharded", "bin"]),
    ambient=st.sampled_from(["", "", *AMBIENT]),
    options=st.lists(
        st.tuples(st.sampled_from(["first", "second", "both"]), st.sampled_from(PART_OPTIONS)).map(
            lambda item: (item[0], *item[1])
        ),
        max_size=3,
    ).map(tuple),
)  # fmt: skip


def prepare(case, folder):
    """Write the parts' checkpoints: (first, second)."""
    for at, name in zip(("first", "second"), case.families):
        config, state = saved(name, 0)
        model = FAMILIES[name].classes[0](config)
        ties = list(model.all_tied_weights_keys.items())
        state = altered(untied(state, ties, "first"), case.steps, model.base_model_prefix or "model")
        write(state, folder / at, case.form, None)
        config.save_pretrained(folder / at)
    return folder / "first", folder / "second"


def load(case, folder, ours):
    """What is put together, or the model of a pipeline."""
    with AMBIENT[case.ambient](), drop_in() if ours else contextlib.nullcontext():
        if case.task:
            return _of_pipeline(case, folder), {"mismatched_keys": []}
        cls, kind = PAIRS[case.pair]
        names = kind.split("_")
        given = {}
        for which, key, value in case.options:
            for at, prefix in zip(("first", "second"), names):
                if which in (at, "both"):
                    loaded = tf.AutoConfig.from_pretrained(folder / at) if value == "object" else value
                    given[f"{prefix}_{key}"] = loaded
        make = getattr(cls, f"from_{kind}_pretrained")
        return make(str(folder / "first"), str(folder / "second"), **given), {"mismatched_keys": []}


def _of_pipeline(case, folder):
    given = {key: value for _, key, value in case.options if key != "config"}
    own = {key: given.pop(key) for key in ("dtype", "device_map") if key in given}
    words = tokenizer(Path(tempfile.mkdtemp(dir=folder)) / "words")
    processors = {
        "tokenizer": words, "image_processor": tf.CLIPImageProcessorPil(),
        "feature_extractor": tf.Wav2Vec2FeatureExtractor(),
    }  # fmt: skip
    return tf.pipeline(case.task, str(folder / "first"), model_kwargs=given, **processors, **own).model


def faults(case, folder):
    """What differs for a case."""
    prepare(case, folder)
    outcomes = []
    before = vars(torch.nn.init).copy(), vars(torch.nn.Module).copy(), vars(tf.PreTrainedModel).copy()
    for ours, seed in ((False, 1), (False, 2), (True, 3)):
        torch.manual_seed(seed)
        transformers_logging.warning_once.cache_clear()
        with contextlib.nullcontext() if ours else poisoned():
            outcomes.append(outcome_of(functools.partial(load, case, folder, ours), "transformers", folder))
        assert torch.get_default_dtype() is torch.float32
    assert before == (vars(torch.nn.init), vars(torch.nn.Module), vars(tf.PreTrainedModel))
    theirs, again, ours = outcomes
    return compare(ours, theirs, again, {}) + ours.fell_back


@few(30)
@given(cases)
def test_composites(quiet_bars, case):
    with tempfile.TemporaryDirectory() as folder:
        found = faults(case, Path(folder))
        assert not found, "\n".join([repr(case), *found])
