"""Many threads load pipelines: every one is right, nothing of the process changes, nobody is disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _check(folder: Path, threads: int, loads: int, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.concurrency.many_pipelines", str(folder), str(threads), str(loads), mode],
        cwd=ROOT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["right"] == threads * loads, result
    for what in ("wrong", "bystander", "ambient", "attributes", "files", "threads"):
        assert result[what] == [], result
    assert result["looks"] > 10, result


def test_four_threads_load_pipelines_of_several_classes(tmp_path: Path) -> None:
    _check(tmp_path, 4, 3, "direct")


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["direct", "installed"])
def test_two_hundred_pipelines(tmp_path: Path, mode: str) -> None:
    _check(tmp_path, 5, 40, mode)
