"""Loads on eight ranks, all in the same eight processes."""

from __future__ import annotations

import pytest
from tests.distributed.launch import launch
from tests.distributed.scenarios_eight import SCENARIOS

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def reports():
    return launch("scenarios_eight", 8)


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_eight_ranks(reports, name):
    for rank, report in enumerate(reports):
        assert report.get(name) == "ok", f"rank {rank}: {report.get(name)}\n{report['log']}"
