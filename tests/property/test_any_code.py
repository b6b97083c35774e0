"""Model classes of somebody's own made up at random, local or brought along by a repository, loaded in many ways.

Through an Auto class, ``pipeline``, an override that calls ``super()`` or the class itself, by weightlift or by the
drop-in, what comes of it is what comes of the original.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.parity.altered import altered, write
from tests.parity.diffusers_pipelines import tokenizer
from tests.parity.missing import poisoned
from tests.parity.outcome import drop_in, outcome_of
from tests.property.search import few
from tests.property.test_any_from_pretrained import compare
from transformers.utils import logging as transformers_logging

import weightlift as wl

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60,
         "max_position_embeddings": 16}  # fmt: skip
STATEMENTS = (
    "self.a = nn.Linear(w, w)",
    "self.b = nn.Linear(w, w, bias=False)",
    "self.b.weight = self.a.weight",
    "self.embed = nn.Embedding(10, w, padding_idx=0)",
    "self.norm = nn.LayerNorm(w)",
    "self.bert = BertModel(BertConfig(**SMALL))",
    "self.part = AutoModel.from_config(BertConfig(**SMALL))",
    "self.part = AutoModel.from_config(config.part)",
    "self.part = AutoModel.from_config(config.part, attn_implementation='eager')",
    "self.part = BertModel._from_config(BertConfig(**SMALL))",
    "self.pre = BertModel.from_pretrained(config.other)",
    "self.pre = AutoModel.from_pretrained(config.other, dtype=torch.bfloat16)",
    "self.register_buffer('table', torch.linspace(0, 1, w), persistent=False)",
    "self.register_buffer('kept', torch.arange(w))",
    "self.scale = nn.Parameter(torch.ones(w) * 0.1)",
    "self.sample = nn.Parameter(torch.randn(w))",
    "self.rates = [x.item() for x in torch.linspace(0, 0.1, 3)]",
    "self.rates = [x.item() for x in torch.linspace(0, 0.1, 3, device='cpu')]",
    "nn.init.normal_(self.a.weight)",
    "nn.init.constant_(self.a.bias, 3.0)",
    "self.a.weight.data.fill_(2)",
    "self.a.requires_grad_(False)",
    "self.eval()",
    "self.deep = copy.deepcopy(self.a)",
    "self.half()",
    "self.to(torch.bfloat16)",
    "self.a.double()",
    "self.list = nn.ModuleList(nn.Linear(w, 2) for _ in range(2))",
    "self.list = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(2)])",
    "self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(w, 3))",
    "config.touched = True",
)
METHODS = (
    "_keep_in_fp32_modules = ['norm', 'a']",
    "_no_split_modules = ['Linear']",
    "_keys_to_ignore_on_load_missing = ['norm', 'scale']",
    "_keys_to_ignore_on_load_unexpected = ['extra']",
    "_tied_weights_keys = {'b.weight': 'a.weight'}",
    "base_model_prefix = 'bert'",
    "supports_gradient_checkpointing = True",
    "def get_input_embeddings(self):\n        return getattr(self, 'embed', None)",
    "def _init_weights(self, module):\n        if isinstance(module, nn.Linear):\n"
    "            nn.init.constant_(module.weight, 0.25)",
    "def _init_weights(self, module):\n        if isinstance(module, (nn.Linear, nn.Embedding)):\n"
    "            module.weight.data.normal_(0, 0.3)",
    "def _init_weights(self, module):\n        super()._init_weights(module)\n        if module is self:\n"
    "            for parameter in self.parameters(recurse=False):\n                nn.init.ones_(parameter)",
    "@classmethod\n    def from_pretrained(cls, *args, **kwargs):\n"
    "        made = super().from_pretrained(*args, **kwargs)\n"
    "        model = made[0] if isinstance(made, tuple) else made\n        model.touched = True\n        return made",
    "def tie_weights(self, *args, **kwargs):\n        return super().tie_weights(*args, **kwargs)",
)  # fmt: skip
CODE = """
import copy
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedConfig, PreTrainedModel

SMALL = {small}

class MineConfig(PreTrainedConfig):
    model_type = "mine"
    {sub_configs}

    def __init__(self, width=8, part=None, other=None, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.other = other
        self.part = BertConfig(**(part or SMALL)) if not isinstance(part, PreTrainedConfig) else part

class MineModel(PreTrainedModel):
    config_class = MineConfig
    {methods}

    def __init__(self, config, flag=False):
        super().__init__(config)
        w = config.width
        {statements}
        self.flag = flag
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return (sum(item.float().sum() for item in self.parameters()),)
"""
OPTIONS: list[tuple[str, Any]] = [
    *[("dtype", value) for value in (torch.bfloat16, torch.float16, "auto", torch.float64, None)],
    ("dtype", {"": torch.bfloat16, "part": torch.float32}),
    *[("device_map", value) for value in ("cpu", "auto")],
    *[("attn_implementation", value) for value in ("eager", "sdpa")],
    ("ignore_mismatched_sizes", True),
    ("low_cpu_mem_usage", True),
    ("flag", True),
    ("width", 4),
    ("unknown", 3),
    ("code_revision", "main"),
    ("config", "object"),
    ("use_safetensors", True),
]  # fmt: skip
STEPS = ("drop", "drop", "drop", "add", "misshape", "cast", "cast all")
number = st.integers(0, 60)


@dataclass(frozen=True)
class Case:
    """A class, its checkpoint, and how it is loaded."""

    statements: tuple[str, ...]
    methods: tuple[str, ...]
    sub_configs: bool
    steps: tuple[tuple[str, int, int], ...]
    form: str
    config_dtype: str | None
    way: str
    trust: bool
    installed: bool
    options: tuple[tuple[str, Any], ...]


cases = st.builds(
    Case,
    statements=st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=6).map(tuple),
    methods=st.lists(st.sampled_from(METHODS), max_size=3).map(tuple),
    sub_configs=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), number, number), max_size=2).map(tuple),
    form=st.sampled_from(["safetensors", "sharded", "bin"]),
    config_dtype=st.sampled_from([None, "float32", "bfloat16"]),
    way=st.sampled_from(["class", "class", "auto", "auto", "pipeline", "registered", "subclass"]),
    trust=st.sampled_from([True, True, True, False]),
    installed=st.booleans(),
    options=st.lists(st.sampled_from(OPTIONS), max_size=2).map(tuple),
)


@functools.cache
def _other():
    """The folder of another model, which constructors may load."""
    folder = tempfile.TemporaryDirectory()
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(folder.name)
    return folder


def prepare(case, folder):
    """Write the repository; the module of its code, or None where the class can't even be made."""
    place = folder / "checkpoint"
    place.mkdir()
    first = [text for text in case.statements if text.startswith("self.a =")] or ["self.a = nn.Linear(w, w)"]
    others = [text for text in case.statements if text != first[0]]
    code = CODE.format(
        small=SMALL, statements="\n        ".join([first[0], *others]),
        methods="\n    ".join(case.methods),
        sub_configs="sub_configs = {'part': BertConfig}" if case.sub_configs else "",
    )  # fmt: skip
    (place / "modeling_mine.py").write_text(code)
    module = util.module_from_spec(spec := util.spec_from_file_location("mine_made_up", place / "modeling_mine.py"))
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    torch.manual_seed(2)
    model = module.MineModel(module.MineConfig(other=_other().name))
    state = {}
    for key, value in model.state_dict().items():
        state[key] = torch.randn(value.shape).to(value.dtype) if value.is_floating_point() else value.clone()
    write(altered(state, case.steps, "bert") or {"extra": torch.ones(1)}, place, case.form, None)
    config = module.MineConfig(other=_other().name)
    config.architectures = ["MineModel"]
    config.dtype = case.config_dtype
    config.save_pretrained(place)
    file = place / "config.json"
    auto_map = {"AutoConfig": "modeling_mine.MineConfig", "AutoModel": "modeling_mine.MineModel"}
    if case.way != "registered":
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto_map}))
    return module


@contextlib.contextmanager
def registered(case, module):
    """The classes are known to the Auto classes within, if they are to be; nothing is left of that."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if case.way == "registered":
        transformers.AutoConfig.register("mine", module.MineConfig)
        transformers.AutoModel.register(module.MineConfig, module.MineModel)
    try:
        yield
    finally:
        CONFIG_MAPPING._extra_content.pop("mine", None)
        for config in [item for item in MODEL_MAPPING._extra_content if item.__name__ == "MineConfig"]:
            del MODEL_MAPPING._extra_content[config]


def load(case, module, folder, by):
    """The model and its loading info: by the original, by ours, or by ours in the original's place."""
    place = folder / "checkpoint"
    given = dict(case.options)
    if "config" in given:
        given["config"] = module.MineConfig.from_pretrained(place)
    cls = module.MineModel
    if case.way in ("auto", "registered"):
        cls = transformers.AutoModel
        if case.way == "auto":
            given["trust_remote_code"] = case.trust
    elif case.way == "subclass":
        cls = type("Sub", (cls,), {"__module__": cls.__module__})
    installed = (
        drop_in() if by == "installed" or (by == "ours" and case.way == "pipeline") else contextlib.nullcontext()
    )
    with installed, registered(case, module):
        if case.way == "pipeline":
            return through_pipeline(case, folder, given), {"mismatched_keys": []}
        given["output_loading_info"] = True
        return wl.from_pretrained(cls, place, **given) if by == "ours" else cls.from_pretrained(place, **given)


def through_pipeline(case, folder, given):
    """The model of a ``pipeline``."""
    own = {key: given.pop(key) for key in ("dtype", "device_map", "config") if key in given}
    words = tokenizer(Path(tempfile.mkdtemp(dir=folder)) / "words")
    return transformers.pipeline(
        "feature-extraction", str(folder / "checkpoint"), tokenizer=words, trust_remote_code=case.trust,
        model_kwargs=given, **own,
    ).model  # fmt: skip


def faults(case, folder):
    """What differs for a case."""
    try:
        module = prepare(case, folder)
    except Exception:
        return []  # it can't be made at all
    outcomes = []
    before = vars(torch.nn.init).copy(), vars(torch.nn.Module).copy(), vars(transformers.PreTrainedModel).copy()
    for by, seed in (("theirs", 1), ("theirs", 2), ("installed" if case.installed else "ours", 3)):
        torch.manual_seed(seed)
        transformers_logging.warning_once.cache_clear()
        loading = functools.partial(load, case, module, folder, by)
        with poisoned() if by == "theirs" else contextlib.nullcontext():
            outcomes.append(outcome_of(loading, "transformers", folder))
        assert torch.get_default_dtype() is torch.float32
    assert before == (vars(torch.nn.init), vars(torch.nn.Module), vars(transformers.PreTrainedModel))
    theirs, again, ours = outcomes
    if theirs.error is not None and "meta" in str(theirs.error) and ours.error is None:
        return loaded(ours, module, case, folder)  # a constructor that needs values, which it has here
    meant = (*MEANT, ": nan") if ours.fell_back else MEANT  # what Transformers leaves as it was in memory
    return [text for text in compare(ours, theirs, again, {}) if not any(name in text for name in meant)]


def loaded(ours, module, case, folder):
    """Which values of the checkpoint a model lacks."""
    state = {}
    for file in (folder / "checkpoint").glob("*model*.*"):
        if file.suffix in (".safetensors", ".bin"):
            state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    known = ours.model.state_dict()
    tied = set(ours.model.all_tied_weights_keys)
    return [
        f"{key}: not as in the checkpoint" for key, value in state.items()
        if key in known and known[key].shape == value.shape and key not in tied
        if not torch.equal(known[key].double(), value.to(known[key].dtype).double())
    ]  # fmt: skip


MEANT = ("a Sub for a Sub",)  # which is made anew for each load


@few(60)
@given(cases)
def test_code(quiet_bars, own_modules, case):
    with tempfile.TemporaryDirectory() as folder:
        found = faults(case, Path(folder))
        assert not found, "\n".join([repr(case), *found])
