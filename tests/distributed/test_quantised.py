"""Pre-quantised models on two ranks, where the packages that read them are installed."""

from __future__ import annotations

import importlib.util

import pytest
from tests.distributed.launch import launch

NEEDS = {
    "compressed_tensors_are_sharded_and_sent": "compressed_tensors",
    "torchaos_tensors_under_efficient_loading": "torchao",
}


@pytest.mark.parametrize("name", NEEDS)
def test_on_two_ranks(name):
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    for rank, report in enumerate(launch("scenarios_quantised", 2, names=(name,))):
        assert report.get(name) == "ok", f"rank {rank}: {report.get(name)}\n{report['log']}"
