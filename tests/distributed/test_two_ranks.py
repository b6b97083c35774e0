"""Loads on two ranks, all in one pair of processes."""

from __future__ import annotations

import pytest
from tests.distributed.launch import launch
from tests.distributed.scenarios_two import SCENARIOS


@pytest.fixture(scope="module")
def reports():
    return launch("scenarios_two", 2)


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_two_ranks(reports, name):
    for rank, report in enumerate(reports):
        assert report.get(name) == "ok", f"rank {rank}: {report.get(name)}\n{report['log']}"
