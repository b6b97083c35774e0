"""Which rows FSDP2 keeps of what was sharded before, against FSDP2 itself: a process is every rank in turn."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import weightlift as wl

# The sizes of a mesh's axes, how many of them (the first) are FSDP2's, and what is done on the others before.
CASES = [
    ((2, 2, 2), 1, [Shard(0), Shard(0)]),
    ((2, 2, 3), 1, [Shard(0), Shard(0)]),
    ((3, 2, 2), 1, [Shard(0), Shard(0)]),
    ((2, 2, 2), 1, [Shard(1), Shard(0)]),
    ((2, 3, 2), 1, [Shard(0), Shard(1)]),
    ((2, 2, 2), 1, [Replicate(), Shard(0)]),
    ((2, 4), 1, [Shard(0)]),
    ((2, 2), 1, [_StridedShard(0, split_factor=3)]),
    ((2, 2, 2), 1, [_StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 2, 2), 2, [Shard(0)]),
    ((2, 1, 2, 2), 2, [Shard(0), Shard(0)]),
]


@pytest.fixture
def as_rank():
    """Makes this process one rank of many."""

    def become(rank, ranks):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())

    assert not dist.is_initialized()
    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


class Weight(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(rows, 4))


@pytest.mark.parametrize("rows", [16, 24, 7, 13, 3])
@pytest.mark.parametrize(("sizes", "own", "placements"), CASES)
def test_each_rank_gets_what_fsdp_keeps_of_its_part(as_rank, sizes, own, placements, rows):
    state = {"w": torch.arange(rows * 4.0).view(rows, 4)}
    for rank in range(prod(sizes)):
        as_rank(rank, prod(sizes))
        names = tuple(f"{axis} of {rank}" for axis in range(len(sizes)))  # torch's caches know meshes by their names
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)

        def parallelize(module, inner=mesh[names[own:]], outer=mesh[names[:own]]):
            module.w = nn.Parameter(distribute_tensor(module.w, inner, placements, src_data_rank=None))
            fully_shard(module, mesh=outer)

        expected = Weight(rows)
        expected.load_state_dict(state)
        parallelize(expected)
        found = wl.load(lambda: Weight(rows), state, parallelize=parallelize)
        assert torch.equal(found.w.to_local(), expected.w.to_local()), rank
