"""Law 1 to the letter: loads that succeed, fail and are cancelled leave every attribute of every library as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_is_written_and_nothing_is_left(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    files, temporary = tmp_path / "files", tmp_path / "tmp"
    files.mkdir()
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.concurrency.audited_loads", str(files), str(temporary)],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    for what in ("wrong", "bystander", "ambient", "attributes", "files", "threads", "left"):
        assert result[what] == [], result
    assert result["watched"] > 50_000 and result["looks"] > 5 and result["loads"] >= 90, result
