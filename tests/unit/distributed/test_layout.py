"""The geometry of local shards against torch's own distribution, on simulated meshes of up to three axes."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from weightlift.distributed.layout import Layout, coordinates, splits_of


def _local_by_torch(tensor, placements, mesh_shape, coordinate):
    """What ``distribute_tensor`` leaves on a rank: torch splits the tensor one mesh axis after another."""
    for placement, parts, index in zip(placements, mesh_shape, coordinate):
        if isinstance(placement, (Shard, _StridedShard)):
            tensor = placement._split_tensor(tensor, parts, with_padding=False, contiguous=True)[0][index]
    return tensor


def _local_by_layout(tensor, layout):
    local = torch.full(layout.local_shape, -1, dtype=tensor.dtype)
    for box in layout.boxes():
        at = tuple(slice(a, a + n) for a, n in zip(box.at, box.sizes))
        start = tuple(slice(a, a + n) for a, n in zip(box.start, box.sizes))
        assert (local[at] == -1).all()
        local[at] = tensor[start]
    return local


@st.composite
def _cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 17), min_size=1, max_size=3)))
    mesh_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    placement = st.one_of(
        st.just(Replicate()),
        dims.map(Shard),
        st.tuples(dims, st.integers(2, 4)).map(lambda pair: _StridedShard(pair[0], split_factor=pair[1])),
    )
    return shape, mesh_shape, [draw(placement) for _ in mesh_shape]


@settings(max_examples=300, deadline=None)
@given(_cases())
def test_layout_agrees_with_torch(case):
    shape, mesh_shape, placements = case
    tensor = torch.arange(prod(shape)).view(shape)
    for coordinate in coordinates(mesh_shape):
        expected = _local_by_torch(tensor, placements, mesh_shape, coordinate)
        layout = Layout(shape, tuple(splits_of(placements, mesh_shape, coordinate, len(shape))))
        assert layout.local_shape == tuple(expected.shape)
        assert torch.equal(_local_by_layout(tensor, layout), expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_fsdp_over_tensor_parallelism(rows, dp, tp):
    """FSDP chunks the local tensor that tensor parallelism left; torch's spec says the same where sizes are even."""
    tensor = torch.arange(rows)
    for a, b in coordinates((dp, tp)):
        mine = Shard._custom_chunk(Shard._custom_chunk(tensor, tp, dim=0)[b], dp, dim=0)[a]
        placements = [_StridedShard(0, split_factor=tp), Shard(0)]
        layout = Layout((rows,), tuple(splits_of(placements, (dp, tp), (a, b), 1)))
        assert torch.equal(_local_by_layout(tensor, layout.as_fsdp_shards()), mine)
        if rows % (dp * tp) == 0:
            assert torch.equal(_local_by_layout(tensor, layout), mine)


def test_all_ranks_together_hold_everything_once():
    layout_of = lambda c: Layout((7, 5), tuple(splits_of([Shard(0), Shard(1)], (4, 2), c, 2)))  # noqa: E731
    assert sum(prod(layout_of(c).local_shape) for c in coordinates((4, 2))) == 35


def test_an_even_interleaved_shard_of_one_stretch_is_one_box():
    layout = Layout((8, 3), tuple(splits_of([_StridedShard(0, split_factor=2), Shard(0)], (2, 2), (1, 0), 2)))
    assert [box.start for box in layout.boxes()] == [(2, 0)]


def test_partial_values_are_refused():
    with pytest.raises(ValueError, match="which part"):
        splits_of([Partial()], (2,), (0,), 1)
