"""What eight ranks do together: the smallest mesh that has three axes of more than one rank each."""

from __future__ import annotations

import pytest
from tests.distributed.models import (
    Experts,
    assert_same_state,
    both,
    checkpoint_of,
    fsdp,
    losses,
    mesh,
    tensor_parallel,
)
from tests.distributed.scenarios_two import _llama, _saved

import weightlift as wl


def _on_three_axes(build, path):
    reference = wl.load(build, path, strict=False, seed=3)
    grid = mesh(2, 2, 2, names=("replicate", "shard", "tp"))
    parallelize = both(tensor_parallel(grid["tp"]), fsdp(grid["replicate", "shard"]))
    for source_rank in (None, 5):
        model = wl.load(build, path, strict=False, seed=3, parallelize=parallelize, source_rank=source_rank)
        assert {len(p.placements) for p in model.parameters()} <= {2, 3}
        assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def a_llama():
    build = _llama()
    _on_three_axes(build, _saved("llama8.pt", checkpoint_of(build, "lm_head", "model.layers.1.self_attn")))


def uneven_blocks_beside_experts():
    _on_three_axes(Experts, _saved("experts8.pt", checkpoint_of(Experts, "layers.1")))


SCENARIOS = {run.__name__: run for run in (a_llama, uneven_blocks_beside_experts)}
