"""``from_pretrained`` under accelerate's FSDP with ``cpu_ram_efficient_loading``, on two ranks."""

from __future__ import annotations

import pytest
from tests.distributed.launch import launch
from tests.distributed.scenarios_pretrained import SCENARIOS


@pytest.fixture(scope="module")
def reports():
    return launch("scenarios_pretrained", 2)


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_two_ranks(reports, name):
    for rank, report in enumerate(reports):
        assert report.get(name) == "ok", f"rank {rank}: {report.get(name)}\n{report['log']}"
