"""Captures of sharded and split models, all in one pair of processes."""

from __future__ import annotations

import pytest
from tests.distributed.launch import launch
from tests.distributed.scenarios_capture import SCENARIOS


@pytest.fixture(scope="module")
def reports():
    return launch("scenarios_capture", 2)


@pytest.mark.parametrize("name", SCENARIOS)
def test_captures_on_two_ranks(reports, name):
    for rank, report in enumerate(reports):
        assert report.get(name) == "ok", f"rank {rank}: {report.get(name)}\n{report['log']}"
