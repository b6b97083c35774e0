"""Many threads load pipelines: every one is right, nothing of the process changes, nobody is disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.concurrency import watch


def _check(folder: Path, threads: int, loads: int, mode: str) -> None:
    result = watch.in_process("many_pipelines", folder, threads, loads, mode, timeout_s=590)
    watch.check(result, "files", "threads")
    assert result["right"] == threads * loads, result


def test_four_threads_load_pipelines_of_several_classes(tmp_path: Path) -> None:
    _check(tmp_path, 4, 3, "direct")


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["direct", "installed"])
def test_two_hundred_pipelines(tmp_path: Path, mode: str) -> None:
    _check(tmp_path, 5, 40, mode)
