"""Whole loads beside each other, and a plan that two threads execute, each losing its turn at any line of ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.interleavings.explorer import explore
from tests.interleavings.stand_ins import stand_in
from torch import nn

import weightlift as wl
from weightlift import handles


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3), persistent=False)


@pytest.fixture
def path(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"embed.weight": torch.arange(8.0).reshape(4, 2)}, path)
    wl.load(_Tied, path)  # what is imported or made at the first load
    wl.load(_Tied, path, dtype=torch.bfloat16, copy=True)
    stand_in(monkeypatch, *_ours())
    return path


def _ours():
    return [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "weightlift"]


def _right(model, dtype):
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, torch.arange(8.0).reshape(4, 2).to(dtype))
    assert torch.equal(model.steps, torch.arange(3))
    assert model.head.weight.dtype == dtype


def _two_loads(path):
    def scene():
        models = {}

        def load(dtype, copy):
            models[dtype] = wl.load(_Tied, path, dtype=dtype, copy=copy)

        def bystander():
            layer = nn.Linear(2, 2)
            assert layer.weight.abs().sum() > 0 and torch.get_default_dtype() == torch.float32

        def check():
            for dtype, model in models.items():
                _right(model, dtype)
            assert len(models) == 2

        bodies = [lambda: load(torch.float32, False), lambda: load(torch.bfloat16, True), bystander]
        return bodies, check

    return scene


def test_two_loads_and_a_bystander(path):
    explored = explore(_two_loads(path), inside=_ours(), preemptions=1, every=97)
    assert explored.complete and explored.longest > 2000


@pytest.mark.full
def test_two_loads_and_a_bystander_at_every_line(path):
    assert explore(_two_loads(path), inside=_ours(), preemptions=1, every=3).complete


def test_a_plan_is_executed_once(path):
    def scene():
        plan = wl.plan(_Tied, path)
        made, refused = [], []

        def execute():
            try:
                made.append(plan.execute())
            except RuntimeError as error:
                refused.append(error)

        def check():
            (model,) = made
            assert len(refused) == 1
            _right(model, torch.float32)

        return [execute, execute], check

    assert explore(scene, inside=[handles], preemptions=2).complete


@pytest.mark.parametrize("other", ["load", "materialize", "planned before"])
def test_a_deferred_module_is_given_values_once(path, other):
    def scene():
        deferred = wl.defer(_Tied, seed=1)
        plan = deferred.plan(path)
        others = {
            "load": lambda: deferred.load(path, copy=True),
            "materialize": deferred.materialize,
            "planned before": plan.execute,
        }
        made, refused = [], []

        def take(way):
            try:
                made.append(way())
            except RuntimeError as error:
                refused.append(error)

        def check():
            (model,), (error,) = made, refused
            assert "already" in str(error)
            assert model.head.weight is model.embed.weight and torch.equal(model.steps, torch.arange(3))
            if other != "materialize":
                _right(model, torch.float32)

        return [lambda: take(lambda: deferred.load(path)), lambda: take(others[other])], check

    assert explore(scene, inside=[handles], preemptions=1).complete
    assert explore(scene, inside=_ours(), preemptions=1, every=29).complete


def test_loads_that_share_a_checkpoint(path):
    def scene():
        checkpoint = wl.open_checkpoint(path)
        models = {}

        def load(dtype, copy):
            models[dtype] = wl.load(_Tied, checkpoint, dtype=dtype, copy=copy)

        def check():
            for dtype, model in models.items():
                _right(model, dtype)
            assert len(models) == 2

        return [lambda: load(torch.float32, False), lambda: load(torch.bfloat16, True)], check

    assert explore(scene, inside=_ours(), preemptions=1, every=29).complete
