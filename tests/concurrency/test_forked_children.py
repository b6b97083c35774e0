"""Loads in forked children find torch's threads in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILDREN = 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_load_on_several_threads() -> None:
    command = [sys.executable, "-m", "tests.concurrency.forked_children", str(CHILDREN)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert ended == {"workers": CHILDREN, "loads": CHILDREN, "constructors": CHILDREN}, done.stderr[-3000:]
