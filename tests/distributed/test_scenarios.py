"""Loads and captures on several ranks; the scenarios of one module run one after the other in the same processes."""

from __future__ import annotations

import functools

import pytest
from tests.distributed import (
    scenarios_again,
    scenarios_any,
    scenarios_capture,
    scenarios_eight,
    scenarios_existing,
    scenarios_failed,
    scenarios_four,
    scenarios_parallelize,
    scenarios_pretrained,
    scenarios_two,
)
from tests.distributed.launch import launch

RUNS = [
    ("scenarios_two", scenarios_two.SCENARIOS, 2, ()),
    ("scenarios_failed", scenarios_failed.SCENARIOS, 2, ()),
    ("scenarios_again", scenarios_again.SCENARIOS, 3, ()),
    ("scenarios_parallelize", scenarios_parallelize.SCENARIOS, 2, ()),
    ("scenarios_existing", scenarios_existing.SCENARIOS, 2, ()),
    ("scenarios_any", scenarios_any.SCENARIOS, 2, ()),
    ("scenarios_any", scenarios_any.SCENARIOS, 4, pytest.mark.full),
    ("scenarios_capture", scenarios_capture.SCENARIOS, 2, ()),
    ("scenarios_pretrained", scenarios_pretrained.SCENARIOS, 2, ()),
    ("scenarios_four", scenarios_four.SCENARIOS, 4, pytest.mark.full),
    ("scenarios_eight", scenarios_eight.SCENARIOS, 8, pytest.mark.full),
]


@pytest.fixture(scope="module")
def reports():
    return functools.cache(launch)


@pytest.mark.parametrize(
    ("module", "ranks", "name"),
    [
        pytest.param(module, ranks, name, marks=marks, id=f"{module}-{name}-{ranks}")
        for module, scenarios, ranks, marks in RUNS
        for name in scenarios
    ],
)
def test_on_every_rank(reports, module, ranks, name):
    for rank, report in enumerate(reports(module, ranks)):
        assert report.get(name) == "ok", f"rank {rank}: {report.get(name)}\n{report['log']}"
