"""What four ranks do together: meshes of two and three axes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.distributed import scenarios_failed
from tests.distributed.models import (
    Experts,
    Tied,
    assert_same_state,
    both,
    checkpoint_of,
    expert_parallel,
    fsdp,
    gathered,
    losses,
    mesh,
    tensor_parallel,
)
from tests.distributed.scenarios_two import FOLDER, MISSING, RANK, _llama, _saved
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import weightlift as wl


def _mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return lambda: MixtralForCausalLM(config)


def fsdp2_over_tensor_parallelism():
    build = _llama()
    path = _saved("llama.pt", checkpoint_of(build, "lm_head", "model.layers.1.self_attn"))
    reference = wl.load(build, path, strict=False, seed=3)
    grid = mesh(2, 2, names=("dp", "tp"))
    parallelize = both(tensor_parallel(grid["tp"]), fsdp(grid["dp"]))
    for source_rank in (None, 0):
        model = wl.load(build, path, strict=False, seed=3, parallelize=parallelize, source_rank=source_rank)
        found = model.model.layers[0].self_attn.q_proj.weight.placements
        assert found == (_StridedShard(0, split_factor=2), Shard(0))
        assert model.model.layers[0].self_attn.o_proj.weight.placements == (Shard(0), Shard(1))
        assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def _spread_mixture(name, parallelize, *source_ranks):
    """A mixture of experts of which one layer's experts are missing; the last model, and one loaded alone."""
    build = _mixtral()
    path = _saved(name, checkpoint_of(build, "model.layers.0.mlp.experts.down_proj"))
    reference = wl.load(build, path, strict=False, seed=3)
    for source_rank in source_ranks:
        model = wl.load(build, path, strict=False, seed=3, parallelize=parallelize, source_rank=source_rank)
        assert_same_state(model, reference)
    return model, reference


def a_mixture_of_experts_by_fsdp2():
    model, reference = _spread_mixture("mixtral.pt", fsdp(mesh(4)), None)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def a_mixture_of_experts_by_fsdp2_over_tensor_parallelism():
    grid = mesh(2, 2, names=("dp", "tp"))
    model, reference = _spread_mixture("mixtral2.pt", both(tensor_parallel(grid["tp"]), fsdp(grid["dp"])), None, 0)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def a_mixture_of_experts_over_tensor_and_expert_parallelism():
    grid = mesh(2, 2, names=("dp", "tp"))
    parallelize = both(both(tensor_parallel(grid["tp"]), expert_parallel(grid["tp"])), fsdp(grid["dp"]))
    _spread_mixture("mixtral3.pt", parallelize, None)


def hybrid_sharding():
    path = _saved("hybrid.pt", checkpoint_of(Tied, *MISSING))
    reference = wl.load(Tied, path, strict=False, seed=3)
    model = wl.load(Tied, path, strict=False, seed=3, parallelize=fsdp(mesh(2, 2, names=("replicate", "shard"))))
    assert model.embed.weight.placements == (Replicate(), Shard(0))
    assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-5)


def three_axes():
    path = _saved("three.pt", checkpoint_of(Experts, "layers.1"))
    reference = wl.load(Experts, path, strict=False, seed=3)
    for shape in ((1, 2, 2), (2, 1, 2), (2, 2, 1)):
        grid = mesh(*shape, names=("replicate", "shard", "tp"))
        parallelize = both(tensor_parallel(grid["tp"]), fsdp(grid["replicate", "shard"]))
        for source_rank in (None, 3):
            model = wl.load(Experts, path, strict=False, seed=3, parallelize=parallelize, source_rank=source_rank)
            assert len(model.layers[0].up.weight.placements) == 3
            assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def uneven_shards_on_four_ranks():
    path = _saved("uneven.pt", checkpoint_of(Tied, *MISSING))
    model = wl.load(Tied, path, strict=False, seed=3, parallelize=fsdp(mesh(4)))
    assert model.embed.weight.to_local().shape[0] == (26, 26, 26, 23)[RANK]
    assert_same_state(model, wl.load(Tied, path, strict=False, seed=3))


def what_a_mesh_of_two_axes_saved_is_loaded_by_others():
    path = _saved("before.pt", checkpoint_of(Tied))
    reference = wl.load(Tied, path)
    grid = mesh(2, 2, names=("dp", "tp"))
    over = both(tensor_parallel(grid["tp"]), fsdp(grid["dp"]))
    for number, saved in enumerate((over, fsdp(mesh(4)), fsdp(mesh(2, 2, names=("replicate", "shard"))))):
        folder = FOLDER / f"dcp-{number}"
        dcp.save({"model": wl.load(Tied, path, parallelize=saved).state_dict()}, checkpoint_id=folder)
        checkpoint = wl.open_checkpoint(folder, within="model")
        for again in (None, fsdp(mesh(4)), tensor_parallel(mesh(4)), over):
            assert_same_state(wl.load(Tied, checkpoint, parallelize=again), reference)


def stages_of_a_pipeline():
    state = checkpoint_of(Tied)
    path = _saved("stages.pt", state)
    grid = mesh(2, 2, names=("pp", "dp"))
    mine = (("embed.", "scale", "layers.0."), ("layers.1.", "layers.2.", "scale"))[grid["pp"].get_local_rank()]

    def stage():
        model = Tied()
        for parent, name in ((model, "embed"), (model, "head"), *((model.layers, str(number)) for number in range(3))):
            prefix = f"layers.{name}." if parent is model.layers else f"{name}."
            if prefix not in mine:
                parent._modules[name] = None
        return model

    def parallelize(model):
        for layer in filter(None, model.layers):
            fully_shard(layer, mesh=grid["dp"])
        fully_shard(model, mesh=grid["dp"])

    with pytest.raises(wl.RanksError, match=r"ranks 2, 3 have another module than ranks 0, 1"):
        wl.load(stage, path, parallelize=parallelize, strict=False)
    for source_rank in (None, dist.get_process_group_ranks(grid["dp"].get_group())[1]):
        model = wl.load(
            stage, path, parallelize=parallelize, process_group=grid["dp"].get_group(), source_rank=source_rank,
            key_mapping=lambda key: key if key.startswith(mine) else None,
        )  # fmt: skip
        loaded = gathered(model)
        assert {*loaded} == {key for key in state if key.startswith(mine)}
        assert all(torch.equal(value, state[key]) for key, value in loaded.items())


SCENARIOS = {
    run.__name__: run
    for run in (
        fsdp2_over_tensor_parallelism,
        a_mixture_of_experts_by_fsdp2,
        a_mixture_of_experts_by_fsdp2_over_tensor_parallelism,
        a_mixture_of_experts_over_tensor_and_expert_parallelism,
        hybrid_sharding,
        three_axes,
        uneven_shards_on_four_ranks,
        what_a_mesh_of_two_axes_saved_is_loaded_by_others,
        stages_of_a_pipeline,
    )
} | scenarios_failed.SCENARIOS
