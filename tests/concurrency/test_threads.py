"""Loads from many threads at once: every model right, nothing of the process written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(folder: Path, threads: int, loads: int) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.concurrency.many_loads", str(folder), str(threads), str(loads)],
        cwd=ROOT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout)
    return result


def _check(result: dict[str, object], loads: int) -> None:
    assert result["right"] == loads, result
    for what in ("wrong", "bystander", "ambient", "attributes", "files", "threads"):
        assert result[what] == [], result
    assert result["mapped"] == 0, result
    assert int(str(result["looks"])) > 10, result


def test_eight_threads_load_a_tied_model(tmp_path: Path) -> None:
    _check(_run(tmp_path, 8, 25), 200)


@pytest.mark.full
def test_two_thousand_loads(tmp_path: Path) -> None:
    _check(_run(tmp_path, 8, 250), 2000)
