"""Regions and parts against torch's own views of real tensors, and against the engine that fills them."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlift.checkpoint.entry import TensorEntry
from weightlift.checkpoint.memory import entry_of
from weightlift.options import LoadOptions
from weightlift.plan import regions
from weightlift.plan.parts import composed, fault_of, local_parts, part
from weightlift.plan.regions import Region, whole
from weightlift.transfer.engine import run
from weightlift.transfer.jobs import Job
from weightlift.transfer.memory import in_memory
from weightlift.transfer.subject import Bytes

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def numbered(shape, base=0):
    return torch.arange(base, base + prod(shape)).reshape(shape)


def step(rng, shape):
    """A view operation that is possible on ``shape``: (our function, torch's)."""
    dim = rng.randrange(len(shape))
    kind = rng.choice(["narrow", "select", "every", "permute", "transpose", "reshape"])
    if kind == "narrow":
        start = rng.randint(0, shape[dim])
        length = rng.randint(min(1, shape[dim] - start), shape[dim] - start)
        return lambda v: regions.narrow(v, dim, start, length), lambda t: t.narrow(dim, start, length)
    if kind == "select" and len(shape) > 1 and shape[dim]:
        index = rng.randrange(shape[dim])
        return lambda v: regions.select(v, dim, index), lambda t: t.select(dim, index)
    if kind == "every":
        start, by = rng.randint(0, shape[dim]), rng.randint(1, 3)
        index = (*[slice(None)] * dim, slice(start, None, by))
        return lambda v: regions.every(v, dim, start, by), lambda t: t[index]
    if kind == "permute":
        order = rng.sample(range(len(shape)), len(shape))
        return lambda v: regions.permute(v, order), lambda t: t.permute(order)
    if kind == "reshape":
        wanted = rng.choice(_factorings(prod(shape)))
        return lambda v: regions.reshape(v, wanted), lambda t: _viewed(t, wanted)
    other = rng.randrange(-len(shape), len(shape))
    return lambda v: regions.transpose(v, dim, other), lambda t: t.transpose(dim, other)


def _factorings(numel):
    found = [(numel,), (1, numel), (-1,)] if numel else [(0,), (3, 0)]
    found += [(a, numel // a) for a in range(1, numel + 1) if numel % a == 0]
    found += [(a, b, numel // a // b) for a in (1, 2, 3) for b in (1, 2, 4) if numel and numel % (a * b) == 0]
    return found


def _viewed(tensor, shape):
    try:
        return tensor.view(shape)
    except RuntimeError:
        return None


@settings(max_examples=500, deadline=None)
@given(st.randoms(use_true_random=False), shapes)
def test_views_are_torchs(rng, shape):
    tensor = numbered(shape)
    entry, region = entry_of("a", tensor), whole(shape)
    view = tensor
    for _ in range(rng.randint(1, 5)):
        if not view.dim():
            break
        ours, theirs = step(rng, tuple(view.shape))
        made, entry_made, region_made = theirs(view), ours(entry), ours(region)
        assert (made is None) == (entry_made is None) == (region_made is None)
        if made is None:
            continue
        view, entry, region = made, entry_made, region_made
    assert entry.shape == region.shape == tuple(view.shape)
    assert torch.equal(in_memory(entry, {"a": tensor}), view)
    assert torch.equal(tensor.as_strided(region.shape, region.stride, region.offset), view)
    assert entry.start <= entry.end <= tensor.nbytes
    assert entry.stride is not None or entry.nbytes == entry.end - entry.start


@pytest.mark.parametrize("call", [
    lambda v: regions.narrow(v, 0, 2, 2), lambda v: regions.narrow(v, 2, 0, 1), lambda v: regions.select(v, 0, 3),
    lambda v: regions.every(v, 0, 0, 0), lambda v: regions.permute(v, (0, 0)), lambda v: regions.reshape(v, (5, 5)),
    lambda v: regions.reshape(v, (-1, -1)), lambda v: part(entry_of("a", torch.zeros(2, 2)), v),
])  # fmt: skip
def test_what_torch_refuses_is_refused(call):
    with pytest.raises(ValueError, match=r"."):
        call(whole((3, 4)))


@st.composite
def splits(draw):
    """A shape and parts that make it: along a dim, stacked, interleaved, or permuted pieces. With the whole tensor."""
    shape = draw(shapes)
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = sorted(draw(st.sets(st.integers(1, max(shape[dim] - 1, 1)), max_size=3)))
    kind = draw(st.sampled_from(["joined", "stacked", "interleaved", "split"]))
    region = whole(shape)
    pieces = []
    if kind == "joined":
        edges = [0, *(cut for cut in cuts if cut < shape[dim]), shape[dim]]
        pieces = [regions.narrow(region, dim, a, b - a) for a, b in itertools.pairwise(edges)]
    elif kind == "stacked":
        pieces = [regions.select(region, dim, index) for index in range(shape[dim])]
    elif kind == "interleaved":
        step = draw(st.integers(1, 3))
        pieces = [regions.every(region, dim, start, step) for start in range(min(step, shape[dim]))]
    else:  # the rotary layout: (heads, 2, half) of one tensor to (heads, half, 2) of the other
        factor = next(f for f in (2, 3, 5, 1) if shape[dim] % f == 0)
        opened = (*shape[:dim], factor, shape[dim] // factor, *shape[dim + 1 :])
        pieces = [regions.transpose(regions.reshape(region, opened), dim, dim + 1)]
    target = numbered(shape)
    sources, parts = {}, []
    for number, piece in enumerate(pieces):
        order = draw(st.permutations(range(len(piece.shape))))
        values = target.as_strided(piece.shape, piece.stride, piece.offset).permute(order).contiguous()
        key = f"k{number}"
        sources[key] = values
        back = [order.index(i) for i in range(len(order))]
        parts.append(part(regions.permute(entry_of(key, values), back), piece))
    return shape, target, sources, tuple(parts)


def filled(shape, parts, sources):
    made = torch.full(shape, -1)
    for item in parts:
        region = made.as_strided(item.shape, item.stride, item.offset)
        assert (region == -1).all(), "written twice"
        region.copy_(in_memory(item.entry, sources))
    return made


@settings(max_examples=300, deadline=None)
@given(splits())
def test_parts_make_the_whole(made):
    shape, target, sources, parts = made
    assert fault_of(parts, shape) is None
    assert torch.equal(filled(shape, parts, sources), target)
    offer = composed("fused", shape, parts)
    assert offer.entry.shape == shape and offer.parts == parts and offer.entries == tuple(p.entry for p in parts)


@settings(max_examples=400, deadline=None)
@given(st.data(), splits())
def test_local_parts_are_the_slice(data, made):
    shape, target, sources, parts = made
    start = tuple(data.draw(st.integers(0, extent)) for extent in shape)
    size = tuple(data.draw(st.integers(0, extent - low)) for extent, low in zip(shape, start, strict=True))
    local = local_parts(parts, shape, start=start, size=size)
    want = target[tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))]
    assert fault_of(local, size) is None
    assert torch.equal(filled(size, local, sources), want)
    # The same piece at a place within a larger local tensor.
    larger = (size[0] + 2, *size[1:])
    inside = regions.narrow(whole(larger), 0, 1, size[0])
    placed = local_parts(parts, shape, start=start, size=size, local=inside)
    assert torch.equal(filled(larger, placed, sources)[1 : 1 + size[0]], want)


@settings(max_examples=100, deadline=None)
@given(splits(), st.sampled_from([torch.int64, torch.float32]), st.integers(1, 3))
def test_the_engine_fills_parts(made, dtype, workers):
    shape, target, sources, parts = made
    result = torch.full(shape, -1, dtype=dtype)
    jobs = [
        Job("x", item.entry, dtype, torch.device("cpu"), into=result.as_strided(item.shape, item.stride, item.offset))
        for item in parts
    ]
    run(jobs, source=Bytes((), sources, {}), options=LoadOptions(workers=workers, progress=False))
    assert torch.equal(result, target.to(dtype))


@settings(max_examples=200, deadline=None)
@given(st.data(), splits())
def test_overlaps_and_holes_are_found(data, made):
    shape, _, _, parts = made
    index = data.draw(st.integers(0, len(parts) - 1))
    assert fault_of((*parts[:index], *parts[index + 1 :]), shape) is not None
    assert fault_of((*parts, parts[index]), shape) is not None
    if len(parts) > 1 and parts[0].entry.numel == parts[1].entry.numel and parts[0].shape == parts[1].shape:
        twice = part(parts[1].entry, Region(parts[0].shape, parts[0].stride, parts[0].offset))
        assert fault_of((parts[0], twice, *parts[2:]), shape) == "two of them overlap"


def test_a_part_outside():
    entry = entry_of("a", torch.zeros(4))
    assert "outside" in fault_of([part(entry, Region((4,), (1,), 1))], (4,))
    assert "outside" in fault_of([part(entry, Region((4,), (2,), 0))], (4,))


def test_parts_of_several_dtypes_are_no_offer():
    pieces = [part(entry_of(k, torch.zeros(2, dtype=d)), Region((2,), (1,), at))
              for k, d, at in [("a", torch.float32, 0), ("b", torch.float16, 2)]]  # fmt: skip
    with pytest.raises(ValueError, match="dtypes"):
        composed("x", (4,), pieces)


def test_a_part_whose_elements_share_a_place_is_an_overlap():
    entry = TensorEntry("a", (4,), torch.float32, None, 0, 16)
    assert fault_of([part(entry, Region((4,), (0,), 0))], (4,)) == "two of them overlap"
