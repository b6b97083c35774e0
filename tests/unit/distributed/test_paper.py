"""Loads worked out on paper, against the layouts of ranks and against what a load really reads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

import weightlift as wl
from weightlift.cli.main import main
from weightlift.distributed.layout import Split
from weightlift.distributed.placing import Mesh, placer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 16)
        self.o_proj = nn.Linear(16, 24, bias=False)
        self.lm_head = nn.Linear(16, 64, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("table", torch.zeros(10))
        self.register_buffer("own", torch.ones(3), persistent=False)


@pytest.fixture
def path(tmp_path):
    state = {key: value.clone() for key, value in Model().state_dict().items() if not key.startswith("lm_head")}
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_every_byte_once_over_fsdp_ranks_but_for_buffers(path):
    ranks = wl.plan(Model, path, mesh_shape={"fsdp": 5}).ranks
    shards = [13 * 64 + 5 * 64] * 4 + [12 * 64 + 4 * 64]
    assert [rank.read_bytes for rank in ranks.ranks] == [nbytes + 40 for nbytes in shards]
    assert ranks.read_bytes == ranks.checkpoint_bytes + 4 * 40
    assert [rank.memory_bytes - rank.read_bytes for rank in ranks.ranks] == [12] * 5


def test_a_cast_shows_in_memory_and_not_in_what_is_read(path):
    plain = wl.plan(Model, path, mesh_shape={"fsdp": 4}).ranks
    cast = wl.plan(Model, path, mesh_shape={"fsdp": 4}, dtype=torch.float64).ranks
    assert cast.read_bytes == plain.read_bytes
    assert sum(rank.memory_bytes for rank in cast.ranks) == 2 * sum(rank.memory_bytes for rank in plain.ranks)


def test_placements_of_torch(path):
    placements = {"embed*": [Shard(0), Replicate()], "o_proj*": [_StridedShard(0, split_factor=2), Shard(0)]}
    ranks = wl.plan(Model, path, mesh_shape=(2, 2), placements=placements).ranks
    assert [rank.coordinate for rank in ranks.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {rank.memory_bytes for rank in ranks.ranks} == {32 * 64 + 6 * 64 + 40 + 12}
    again = wl.plan(Model, path, mesh_shape=(2, 2), placements=lambda name, shape: next(
        (value for key, value in placements.items() if name.startswith(key[:-1])), None)).ranks  # fmt: skip
    assert again == ranks


def test_names_of_axes_say_how_models_are_usually_sharded():
    mesh = Mesh.of({"fsdp": 4, "tp": 2})
    splits = placer(mesh, None, named=True)
    assert splits("layers.0.q_proj.weight", (8, 8), "parameter", (3, 1)) == (Split(0, 4, 3, 2), Split(0, 2, 1))
    assert splits("layers.0.o_proj.weight", (8, 8), "parameter", (3, 1)) == (Split(0, 4, 3), Split(1, 2, 1))
    assert splits("layers.0.o_proj.bias", (8,), "parameter", (3, 1)) == (Split(0, 4, 3),)
    assert splits("layers.0.norm.weight", (8,), "parameter", (3, 1)) == (Split(0, 4, 3),)
    assert splits("mlp.experts.gate_up_proj", (6, 8, 8), "parameter", (0, 1)) == (Split(0, 4, 0), Split(1, 2, 1))
    assert splits("table", (8,), "buffer", (3, 1)) == ()
    experts = placer(Mesh.of({"ep": 2, "dp": 2}), None, named=True)
    assert experts("mlp.experts.down_proj", (6, 8, 8), "parameter", (1, 0)) == (Split(0, 2, 1),)


@pytest.mark.parametrize(
    ("mesh_shape", "placements", "text"),
    [
        ({"fsdp": 0}, None, "positive sizes"),
        ((), None, "positive sizes"),
        ({"pipeline": 2}, None, "no axis is known by the name pipeline"),
        ((2, 2), {"*": [Shard(0)]}, "1 for a mesh of 2 axes"),
    ],
)
def test_meshes_that_can_not_be(path, mesh_shape, placements, text):
    with pytest.raises(ValueError, match=text):
        wl.plan(Model, path, mesh_shape=mesh_shape, placements=placements)


def test_parts_of_a_row_are_shared_out(path):
    from weightlift.checkpoint.entry import TensorEntry
    from weightlift.distributed.paper import Wanted, work_out
    from weightlift.plan.parts import part
    from weightlift.plan.regions import select, whole

    entries = [TensorEntry(str(i), (4, 8), torch.float32, path, i * 128, i * 128 + 128) for i in range(6)]
    parts = tuple(part(entry, select(whole((6, 4, 8)), 0, i)) for i, entry in enumerate(entries))
    report = work_out([Wanted("w", (6, 4, 8), torch.bfloat16, "parameter", parts)], {path: 999}, (4,), None)
    assert [rank.read_bytes for rank in report.ranks] == [256, 256, 256, 0]
    assert [rank.requests for rank in report.ranks] == [2, 2, 2, 0]
    assert [rank.memory_bytes for rank in report.ranks] == [128, 128, 128, 0]
    assert report.files[0].ranks == 3


def test_the_plan_prints_and_exports_the_mesh(path):
    plan = wl.plan(Model, path, mesh_shape={"fsdp": 4})
    assert "mesh fsdp=4: 4 ranks" in str(plan)
    assert json.loads(plan.to_json())["mesh"]["ranks"][3]["rank"] == 3


def test_command_line(path, capsys):
    assert main(["plan", str(path), "--mesh", "fsdp=2,tp=2"]) == 0
    out = capsys.readouterr().out
    assert "mesh fsdp=2 × tp=2: 4 ranks" in out
    assert "1.26× the 5.7 kB" in out  # o_proj's columns are read with the gaps between them
    assert main(["plan", str(path), "--mesh", "fsdp=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"] == {"fsdp": 2}
    assert main(["plan", str(path)]) == 2
    assert "--mesh" in capsys.readouterr().err
    assert main(["plan", str(path), "--mesh", "rows=2"]) == 2
    assert "no axis is known by the name rows" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--mesh", "fsdp"])
