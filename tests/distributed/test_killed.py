"""A rank that is killed makes the others raise, and none of them hangs."""

from __future__ import annotations

import signal

import pytest
from tests.distributed.launch import launch

FULL = pytest.mark.full


@pytest.mark.parametrize("name", ["killed_while_reading", pytest.param("killed_while_receiving", marks=FULL)])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=FULL)])
def test_a_killed_rank(name, ranks):
    *others, last = launch("scenarios_killed", ranks, names=(name,), timeout_s=120)
    assert last["exit"] == -signal.SIGKILL, last["log"]
    for report in others:
        assert report["exit"] == 0, report["log"]
