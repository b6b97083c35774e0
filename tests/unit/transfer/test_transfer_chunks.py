"""The pure part: every element exactly once, within the limits, few pieces for many tensors."""

import random
from collections import Counter
from pathlib import Path

import pytest

from weightlift import strides
from weightlift.options import DEFAULT_BUDGET_BYTES
from weightlift.transfer import chunks
from weightlift.transfer.chunks import Block, Direct, Limits, Request

FILE = Path("f")


@pytest.mark.parametrize("seed", range(60))
def test_boxes_cover_every_element_once(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 4)))
    stride = [0] * len(shape)
    step = rng.randint(1, 2)
    for dim in rng.sample(range(len(shape)), len(shape)):
        stride[dim] = step
        step *= shape[dim] + rng.randint(0, 1)
    limit = rng.randint(1, 40)
    seen = Counter()
    for starts, sizes in chunks.boxes(shape, tuple(stride), limit):
        assert strides.span_elements(sizes, stride) <= limit
        indices = [()]
        for a, n in zip(starts, sizes, strict=True):
            indices = [(*index, a + i) for index in indices for i in range(n)]
        seen.update(indices)
    total = 1
    for size in shape:
        total *= size
    assert len(seen) == total and set(seen.values()) == {1}


def requests(sizes, itemsize=2, gap=0, direct=False):
    start, result = 128, []
    for job, n in enumerate(sizes):
        nbytes = n * itemsize
        result.append(Request(job, FILE, start, itemsize, nbytes, (n,), None, None, direct))
        start += nbytes + gap
    return result


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_every_byte_has_one_writer(seed, direct):
    rng = random.Random(seed)
    sizes = [rng.choice([1, 5, 100, 40_000, 300_000]) for _ in range(60)]
    limit = Limits(rng.choice([2048, 4096, 1 << 20]), 1 << 20, 2 << 20, 2)
    written = {job: [] for job in range(len(sizes))}
    for piece in chunks.pieces(requests(sizes, gap=rng.choice([0, 3, 100_000]), direct=direct), limit):
        if isinstance(piece, Direct):
            written[piece.job].append((piece.at, piece.end - piece.start))
            continue
        assert piece.end - piece.start <= limit.block_bytes
        for cut in piece.cuts:
            assert cut.at >= 0 and cut.at + cut.nbytes <= piece.end - piece.start
            written[cut.job].append((cut.dst_offset * 2, cut.nbytes))
    for job, n in enumerate(sizes):
        reached = 0
        for at, nbytes in sorted(written[job]):
            assert at == reached
            reached += nbytes
        assert reached == n * 2


@pytest.mark.parametrize("seed", range(10))
def test_overlapping_tensors(seed):
    rng = random.Random(seed)
    found = []
    for job in range(20):
        n = rng.choice([10, 700, 5000])
        found.append(Request(job, FILE, rng.randrange(0, 4000, 2), 2, 2 * n, (n,), None, None, False))
    got = Counter()
    for piece in chunks.pieces(found, Limits(1024, 1024, 2 << 20, 1)):
        assert piece.end - piece.start <= 1024
        for cut in piece.cuts:
            assert cut.at >= 0 and cut.at + cut.nbytes <= piece.end - piece.start
            assert piece.start + cut.at == found[cut.job].start + 2 * cut.dst_offset
            got[cut.job] += cut.nbytes
    assert got == {r.job: r.nbytes for r in found}


def test_ninety_thousand_tensors_are_few_pieces():
    limit = chunks.limits(90_000 * 2048, 8, DEFAULT_BUDGET_BYTES)
    pieces = chunks.pieces(requests([1024] * 90_000), limit)
    assert len(pieces) < 100
    assert sum(p.nbytes for p in pieces) == 90_000 * 2048


def test_gaps_and_places_part_reads():
    assert len(chunks.pieces(requests([10, 10], gap=1000), Limits(1 << 20, 1 << 20, 2 << 20, 1))) == 1
    assert len(chunks.pieces(requests([10, 10], gap=100_000), Limits(1 << 20, 1 << 20, 2 << 20, 1))) == 2
    a, b = requests([10, 10])
    b = Request(1, FILE, b.start, 2, 20, (10,), None, None, False, "cuda:0")
    assert [type(p) for p in chunks.pieces([a, b], Limits(1 << 20, 1 << 20, 2 << 20, 1))] == [Block, Block]


@pytest.mark.parametrize("budget", [1 << 16, 1 << 20, 1 << 24, DEFAULT_BUDGET_BYTES])
@pytest.mark.parametrize("workers", [1, 2, 8, 64])
@pytest.mark.parametrize("total", [0, 1, 1 << 20, 1 << 34])
def test_limits_stay_in_the_budget(budget, workers, total):
    limit = chunks.limits(total, workers, budget)
    assert 3 * limit.workers * limit.block_bytes <= budget
    assert 3 * limit.workers * limit.upload_bytes <= budget
    assert 1 <= limit.workers <= workers and limit.block_bytes % 16 == 0 and limit.direct_bytes % (2 << 20) == 0
    assert limit.upload_bytes.bit_count() == 1  # which pinned memory has anyway


def test_what_goes_to_a_device_is_cut_into_larger_blocks():
    limit = chunks.limits(1 << 34, 8, DEFAULT_BUDGET_BYTES)
    (request,) = requests([1 << 24])
    there = Request(0, FILE, request.start, 2, 2 << 24, (1 << 24,), None, None, False, "cuda:0")
    assert {piece.nbytes for piece in chunks.pieces([there], limit)} == {limit.upload_bytes} == {8 << 20}
    from_memory = there._replace(file=None)
    assert {piece.nbytes for piece in chunks.pieces([from_memory], limit)} == {limit.upload_bytes}
    cast = there._replace(place="cpu")
    assert {piece.nbytes for piece in chunks.pieces([cast], limit)} == {limit.block_bytes} == {2 << 20}


def test_overlapping():
    assert chunks.overlapping([(0, 4), (4, 8), (2, 3), (8, 8), (7, 9), (0, 4)]) == {2, 4, 5}


def test_geometry():
    assert strides.is_row_major((3, 1, 4), (4, 99, 1)) and not strides.is_row_major((3, 4), (1, 3))
    assert strides.has_overlap((3, 4), (0, 1)) and strides.has_overlap((5, 3), (1, 1))
    assert not strides.has_overlap((2, 0), (0, 1))
    assert not strides.has_overlap((3, 4), (1, 3)) and not strides.has_overlap((1, 4), (0, 2))
