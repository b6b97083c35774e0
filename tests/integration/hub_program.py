"""Models by hub id, from a local cache, offline: with a revision, with a repository's own code, from threads at once.

Run by test_transformers_sources.py in a process whose environment names the caches; prints what was wrong as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tests.parity.compare import differences, native_only
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import weightlift as wl

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
FIRST, SECOND = "1" * 40, "2" * 40

# Code such as repositories bring along: values are read, memory is written through numpy, init functions are called.
CONFIGURATION = '''
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own_code"

    def __init__(self, width=16, depth=3, drop_path=0.1, by_hand=False, **kwargs):
        self.width, self.depth, self.drop_path, self.by_hand = width, depth, drop_path, by_hand
        super().__init__(**kwargs)
'''
MODELING = '''
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_own import OwnConfig


class Block(nn.Module):
    def __init__(self, width, rate):
        super().__init__()
        self.rate = rate
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        self.gamma = nn.Parameter(torch.full((width,), 1e-4) * torch.arange(1, width + 1))


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    _tied_weights_keys = {"head.weight": "embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        rates = [rate.item() for rate in torch.linspace(0, config.drop_path, config.depth)]
        assert abs(rates[-1] - config.drop_path) < 1e-3, rates
        self.embed = nn.Embedding(50, config.width)
        self.blocks = nn.ModuleList(Block(config.width, rate) for rate in rates)
        self.head = nn.Linear(config.width, 50, bias=False)
        table = torch.zeros(8, config.width)
        if config.by_hand:  # on the meta device this can't be run
            table.numpy()[:, ::2] = np.arange(8)[:, None]
            table[:, 1::2] = torch.cos(table[:, ::2])
            if table.sum() <= 0:
                raise ValueError("nothing was computed")
        self.register_buffer("table", table)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)
        elif isinstance(module, nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids):
        hidden = self.embed(ids) + self.table[: ids.shape[-1]]
        for block in self.blocks:
            hidden = hidden + block.gamma * block.proj(hidden)
        return self.head(hidden)
'''


def repository(name: str) -> tuple[Path, Path]:
    """Two snapshots of a repository in the cache, the first of them on ``main``, the other on the branch ``other``."""
    root = Path(os.environ["HF_HUB_CACHE"]) / f"models--{name.replace('/', '--')}"
    for branch, commit in (("main", FIRST), ("other", SECOND)):
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / branch).write_text(commit)
        (root / "snapshots" / commit).mkdir(parents=True)
    return root / "snapshots" / FIRST, root / "snapshots" / SECOND


def write_own_code(folder: Path, by_hand: bool = False) -> Any:
    """A repository with its code and a checkpoint; the model that was saved."""
    folder.mkdir(exist_ok=True)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    fields = {"model_type": "own_code", "auto_map": auto_map, "dtype": "float32", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**fields, "by_hand": by_hand}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = get_class_from_dynamic_module(auto_map["AutoModel"], str(folder))(config)
    left_out = ("head.weight", "table") if by_hand else ("head.weight",)
    state = {key: value.clone() for key, value in model.state_dict().items() if key not in left_out}
    torch.save(state, folder / "pytorch_model.bin")
    return model.eval()


def both_ways(found: list[str], what: str, cls: Any, name: str, **options: Any) -> Any:
    theirs, expected = cls.from_pretrained(name, output_loading_info=True, **options)
    with native_only():
        ours, info = wl.from_pretrained(cls, name, output_loading_info=True, **options)
    found += [f"{what}: {item}" for item in differences(ours, theirs)]
    if info != expected:
        found.append(f"{what}: loading info {info} for {expected}")
    if type(ours) is not type(theirs):
        found.append(f"{what}: a {type(ours)} for a {type(theirs)}")
    return ours


def own_code(found: list[str]) -> None:
    """A repository's own classes, by folder and by hub id."""
    folder, by_hand = (Path(os.environ["HF_HUB_CACHE"]) / name for name in ("local", "by_hand"))
    write_own_code(folder)
    write_own_code(repository("org/own-code")[0])
    trusted: dict[str, Any] = {"trust_remote_code": True, "code_revision": "main", "_commit_hash": FIRST}
    with ThreadPoolExecutor(4) as pool, native_only():
        names = [str(folder), "org/own-code"] * 6
        models = list(pool.map(lambda name: wl.from_pretrained(AutoModel, name, **trusted), names))
    found += [
        f"{model.name_or_path}: its class is not registered"
        for model in models[:2]
        if type(model.config) not in AutoModel._model_mapping or type(model)._auto_class != "AutoModel"
    ]
    for name, model in zip(names, models):
        theirs = AutoModel.from_pretrained(name, trust_remote_code=True)
        found += [f"{name}: {item}" for item in differences(model, theirs)]
        ids = torch.arange(5)
        rates = [block.rate for block in model.blocks] == [block.rate for block in theirs.blocks]
        if not (rates and torch.equal(model(ids), theirs(ids))):
            found.append(f"{name}: computes something else")
    both_ways(found, "own code", AutoModel, str(folder), trust_remote_code=True, dtype=torch.bfloat16)
    try:
        wl.from_pretrained(AutoModel, str(folder), trust_remote_code=False)
        found.append("code was run that nobody trusts")
    except ValueError:
        pass
    wl.install()
    model = AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    wl.uninstall()
    found += [f"installed: {item}" for item in differences(model, models[0])]
    saved = write_own_code(by_hand, by_hand=True)
    model = wl.from_pretrained(AutoModel, str(by_hand), trust_remote_code=True)
    if not torch.equal(model.table, saved.table) or not torch.equal(model(torch.arange(5)), saved(torch.arange(5))):
        found.append("what the constructor computes by hand differs")


def main() -> None:
    found: list[str] = []
    torch.manual_seed(0)
    first, second = repository("org/llama")
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(first)
    LlamaForCausalLM(config).save_pretrained(second, max_shard_size=8000)
    one = both_ways(found, "hub id", AutoModelForCausalLM, "org/llama")
    two = both_ways(found, "revision", LlamaForCausalLM, "org/llama", revision="other", dtype=torch.bfloat16)
    both_ways(found, "commit", LlamaForCausalLM, "org/llama", revision=SECOND)
    if torch.equal(one.lm_head.weight.bfloat16(), two.lm_head.weight):
        found.append("the revisions are one")
    inner, _ = repository("org/inner")
    BertModel(BertConfig(**SMALL)).save_pretrained(inner / "text_encoder", variant="fp16")
    both_ways(found, "subfolder", BertModel, "org/inner", subfolder="text_encoder", variant="fp16")
    for attempt in (lambda: wl.from_pretrained(AutoModel, "org/nowhere"),
                    lambda: wl.from_pretrained(LlamaForCausalLM, "org/llama", revision="gone")):  # fmt: skip
        try:
            attempt()
        except OSError:
            continue
        found.append("something was loaded from nowhere")

    own_code(found)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
