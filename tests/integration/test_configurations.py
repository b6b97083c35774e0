"""Transformers' default configurations, at full size, build deferred in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SELECTION = ("llama", "mixtral", "deepseek_v3", "bert", "t5", "vit", "swin", "whisper", "clip", "mamba")


def _build(*names: str, seconds: float = 550) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "benchmarks/configurations.py", "--json", "--rounds", "0", *names],
        cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check(results: list[dict[str, object]]) -> None:
    assert [r for r in results if "error" in r] == []
    too_much = {r["name"]: r["growth_bytes"] for r in results if int(str(r.get("growth_bytes", 0))) >= 300_000_000}
    assert too_much == {}


def test_a_selection_of_configurations() -> None:
    results = _build(*_SELECTION)
    assert [r["name"] for r in results if "numel" in r] == list(_SELECTION)
    _check(results)


@pytest.mark.full
@pytest.mark.timeout(1700)
def test_every_configuration() -> None:
    results = _build(seconds=1600)
    assert sum("numel" in r for r in results) > 300
    _check(results)
