"""examples/server.py under load: a few seconds here, ten minutes by ``python tests/concurrency/soak.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("minutes", [0.05, pytest.param(10, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
@pytest.mark.skipif(sys.platform != "linux", reason="samples /proc")
def test_no_wrong_answer_and_flat_memory(minutes: float) -> None:
    pytest.importorskip("flask")
    pytest.importorskip("waitress")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "concurrency" / "soak.py"), "--minutes", str(minutes)],
        cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes + 200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["wrong in all"] == 0, result
    assert result["requests"] > 10 and result["swaps"] > 2, result
    for what in ("descriptors", "threads", "checkpoint mappings"):
        assert result["highest"][what] <= result["warm"][what] + 20, result
    if minutes >= 5:
        assert result["last"]["anonymous_kb"] < 1.1 * result["warm"]["anonymous_kb"], result
