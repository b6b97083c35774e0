"""Loads on four ranks, all in the same four processes."""

from __future__ import annotations

import pytest
from tests.distributed.launch import launch
from tests.distributed.scenarios_four import SCENARIOS

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def reports():
    return launch("scenarios_four", 4)


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_four_ranks(reports, name):
    for rank, report in enumerate(reports):
        assert report.get(name) == "ok", f"rank {rank}: {report.get(name)}\n{report['log']}"
