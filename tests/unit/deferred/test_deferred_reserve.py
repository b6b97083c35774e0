"""Reserved memory: zero-filled, costs nothing before it is touched, shares mappings, and can be sealed."""

import itertools
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.deferred import reserve
from weightlift.deferred.reserve import Block, Reservations, unseal


def test_a_reservation_is_zeros_and_writable():
    buffer, _, _ = Reservations().reserve(1000)
    assert bytes(buffer) == bytes(1000) and len(buffer) == 1000
    buffer[999] = 7
    assert buffer[999] == 7


def test_small_reservations_share_a_block_and_do_not_overlap():
    reservations = Reservations()
    made = [reservations.reserve(nbytes) for nbytes in (1, 63, 64, 65, 4097) for _ in range(50)]
    assert len({id(block) for _, block, _ in made}) == 1
    spans = sorted((offset, offset + len(buffer)) for buffer, _, offset in made)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % 64 == 0 for start, _ in spans)


def test_a_full_arena_is_followed_by_another():
    reservations = Reservations()
    made = [reservations.reserve(900_000) for _ in range(40)]
    assert all(len(buffer) == 900_000 and offset + 900_000 <= block.size_bytes for buffer, block, offset in made)
    assert 2 <= len({id(block) for _, block, _ in made}) <= 4


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each has a block of its own")
def test_large_reservations_share_blocks_but_no_page():
    reservations = Reservations()
    made = [reservations.reserve((1 << 20) + 1) for _ in range(1000)]
    assert len({id(block) for _, block, _ in made}) < 20
    spans = sorted((id(block), offset, offset + len(buffer)) for buffer, block, offset in made)
    pages = [(block, page) for block, start, end in spans for page in (start // mmap.PAGESIZE, end // mmap.PAGESIZE)]
    assert len(set(pages)) == 2000


def test_where_address_space_is_limited_large_reservations_leave_next_to_none_unused(monkeypatch):
    monkeypatch.setattr(reserve.pages, "space_is_free", lambda: False)
    reservations = Reservations()
    blocks = {id(block): block for _, block, _ in (reservations.reserve(1 << 20) for _ in range(20_000))}
    assert sum(block.size_bytes for block in blocks.values()) < 1.02 * (20_000 << 20)
    assert len(blocks) < 1000
    first = [reservations.reserve(64 << 20)[1].size_bytes for reservations in (Reservations(), Reservations())]
    assert first == [64 << 20] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives back a part of a mapping")
def test_the_memory_of_a_large_tensor_goes_back_when_it_dies_and_its_neighbours_stay():
    def build():
        module = nn.Module()
        for name in ("a", "b", "c"):
            module.register_parameter(name, nn.Parameter(torch.ones(24 << 18)))
        return module

    module = wl.defer(build).materialize()
    before = _resident_bytes()
    del module.b
    assert before - _resident_bytes() > 20 << 20
    assert module.a.min() == module.a.max() == module.c.min() == module.c.max() == 1


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_an_arena_that_is_refused_is_made_smaller(monkeypatch):
    asked = []

    class Refusing(Block):
        def __init__(self, size_bytes):
            asked.append(size_bytes)
            if size_bytes > 1 << 20:
                raise MemoryError
            super().__init__(size_bytes)

    monkeypatch.setattr(reserve, "Block", Refusing)
    buffer, _, _ = Reservations().reserve(100)
    assert len(buffer) == 100 and asked == [16 << 20, 4096]


@pytest.mark.parametrize("elements", [2**45, 2**61, 2**62])
def test_more_than_any_system_has_is_a_lack_of_memory(elements):
    with pytest.raises(MemoryError, match=f"{4 * elements:,} bytes"):
        wl.defer(lambda: nn.ParameterList([torch.empty(elements)]))


def test_threads_get_disjoint_memory(at_once):
    reservations = Reservations()
    made = at_once(lambda _: [reservations.reserve(100) for _ in range(300)], 4)
    assert len({(id(block), offset) for mine in made for _, block, offset in mine}) == 1200


_SEALED = """
import torch
from weightlift.deferred.reserve import Reservations, unseal
buffer, block, offset = Reservations().reserve(5000)
other, _, _ = Reservations().reserve(5000)
assert block.sealed
unseal(block, offset, 5000)
torch.frombuffer(buffer, dtype=torch.uint8)[4999] = 1
print("opened", flush=True)
torch.frombuffer(other, dtype=torch.uint8)[0].item()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sealing is for Linux")
def test_sealed_memory_faults_until_it_is_opened():
    done = subprocess.run(
        [sys.executable, "-c", _SEALED], env={**os.environ, "WEIGHTLIFT_GUARD_RESERVATIONS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "opened\n" and done.returncode == -11, done.stderr


def test_unsealing_what_is_open_does_nothing():
    unseal(Block(4096), 0, 4096)
