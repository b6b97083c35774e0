"""A rank that is killed makes the others raise, and none of them hangs."""

from __future__ import annotations

import signal

import pytest
from tests.distributed.launch import launch

FULL = pytest.mark.full
NAMES = [
    "killed_while_reading",
    pytest.param("killed_while_receiving", marks=FULL),
    pytest.param("killed_while_sending", marks=FULL),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=FULL)])
def test_a_killed_rank(name, ranks):
    reports = launch("scenarios_killed", ranks, names=(name,), timeout_s=120)
    victim = reports.pop(0 if name == "killed_while_sending" else -1)
    assert victim["exit"] == -signal.SIGKILL, victim["log"]
    for report in reports:
        assert report["exit"] == 0, report["log"]
