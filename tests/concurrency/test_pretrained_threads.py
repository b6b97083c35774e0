"""Many threads load Transformers models: every one is right, nothing of the process changes, nobody is disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(folder: Path, threads: int, loads: int, mode: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.concurrency.many_pretrained", str(folder), str(threads), str(loads), mode],
        cwd=ROOT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout)
    return result


def _check(result: dict[str, object], loads: int) -> None:
    assert result["right"] == loads, result
    for what in ("wrong", "bystander", "ambient", "attributes"):
        assert result[what] == [], result
    assert int(str(result["looks"])) > 10, result


@pytest.mark.parametrize("mode", ["direct", "installed"])
def test_eight_threads_load_models_of_several_classes(tmp_path: Path, mode: str) -> None:
    _check(_run(tmp_path, 8, 8, mode), 64)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["direct", "installed"])
def test_a_thousand_loads(tmp_path: Path, mode: str) -> None:
    _check(_run(tmp_path, 8, 125, mode), 1000)
