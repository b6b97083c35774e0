"""Loads from many threads at once: every model right, nothing of the process written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.concurrency.watch import check, in_process


def _loads(folder: Path, each: int) -> None:
    result = in_process("many_loads", folder, 8, each, timeout_s=500)
    assert result["right"] == 8 * each, result
    check(result, "files", "threads", "mapped")


def test_eight_threads_load_a_tied_model(tmp_path: Path) -> None:
    _loads(tmp_path, 25)


@pytest.mark.full
def test_two_thousand_loads(tmp_path: Path) -> None:
    _loads(tmp_path, 250)
