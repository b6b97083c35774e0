"""Views with gaps: only the runs are read, and they arrive where they belong."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transfer_helpers import load

import weightlift as wl
from weightlift.plan.regions import narrow
from weightlift.strides import row_major
from weightlift.transfer import combs
from weightlift.transfer.jobs import Job
from weightlift.transfer.sources import FileSource


class Counting(FileSource):
    def __init__(self):
        self.read_bytes = 0

    def open(self, file):
        handle = super().open(file)
        plain, cached = handle.readinto, handle.readinto_cached

        def count(read):
            def counted(buffer, offset):
                done = read(buffer, offset)
                self.read_bytes += max(done, 0)
                return done

            return counted

        handle.readinto, handle.readinto_cached = count(plain), count(cached)
        return handle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "start", "sizes"),
    [
        ((50, 9000), (0, 1000), (50, 700)),
        ((50, 9000), (3, 0), (9, 9000)),
        ((4, 60, 3000), (1, 7, 0), (3, 5, 3000)),
        ((4, 60, 9000), (0, 2, 8000), (4, 31, 1000)),
        ((700, 5000), (0, 4999), (700, 1)),
        ((3, 1, 20000), (0, 0, 0), (3, 1, 10000)),
        ((40, 70), (2, 3), (30, 5)),
    ],
)
@pytest.mark.parametrize("budget", [None, 200_000])
def test_only_the_runs_of_a_box_are_read(tmp_path: Path, shape, start, sizes, dtype, budget):
    tensor = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    save_file({"a": torch.zeros(3), "w": tensor}, tmp_path / "w.safetensors")
    checkpoint = wl.open_checkpoint(tmp_path / "w.safetensors")
    view = checkpoint["w"]
    for dim, (low, size) in enumerate(zip(start, sizes)):
        view = narrow(view, dim, low, size)
    into = torch.full(sizes, -1, dtype=dtype)
    source = Counting()
    job = Job("w", view, dtype, torch.device("cpu"), into=into)
    load([job], files=checkpoint.files, copy=True, workers=3, memory_budget_bytes=budget, source=source)
    box = tuple(slice(low, low + size) for low, size in zip(start, sizes))
    assert torch.equal(into, tensor[box].to(dtype))
    requests, expected = combs.cost(sizes, row_major(shape) if view.stride is None else view.stride, 4)
    assert source.read_bytes <= expected
    if requests > 1:
        assert source.read_bytes == view.nbytes


def test_short_gaps_are_read_along():
    assert combs.cost((10, 90), (100, 1), 4) == (1, (9 * 100 + 90) * 4)
    assert combs.cost((10, 90), (100_000, 1), 4) == (10, 3600)
    assert list(combs.ranges_of(8, (2, 2, 3), (600, 100, 1), 4)) == [(8, 20), (408, 420), (2408, 2420), (2808, 2820)]


def test_transposed_views_are_left_to_the_general_way():
    assert not combs.has_gaps((5, 4), (1, 100_000), 4)
