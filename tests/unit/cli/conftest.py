"""A checkpoint, a module of models to name on the command line, and a way to run the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightlift.cli.main import main

MODELS = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight

def wide(): return Tied(12)
def needs(config, *, size): return Tied()
def fails(): raise RuntimeError("no such config\\nand more")
def leaves(): raise SystemExit(3)
def returns_text(): return "a model"
class Complains(Tied):
    def _load_from_state_dict(self, *arguments, **options): raise ValueError("the hook says no")

instance = Tied()
number = 3

class Namespace:
    build = staticmethod(Tied)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: ``cli_models.py`` and ``ckpt/``, two shard files and an index, without the tied head."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [item for item in sys.path if item != ""])
    for name in ("cli_models", "cli_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "cli_models.py").write_text(MODELS)
    (tmp_path / "cli_broken.py").write_text("import there_is_no_such_package")
    folder = tmp_path / "ckpt"
    folder.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {"embed.weight": torch.randn(16, 8)},
        "model-00002-of-00002.safetensors": {
            f"layers.{n}.{kind}": torch.randn(8, 8) if kind == "weight" else torch.randn(8)
            for n in range(3)
            for kind in ("weight", "bias")
        },
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; its exit code, standard output and standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return call
