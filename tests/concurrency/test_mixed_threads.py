"""Many threads load models and pipelines of both libraries, single files among them: every one is right, nothing of the
process changes, nobody is disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.concurrency import watch


def _check(folder: Path, each: int, mode: str, timeout_s: float) -> None:
    result = watch.in_process("many_mixed", folder, 8, each, mode, timeout_s=timeout_s)
    watch.check(result, "files", "threads")
    assert result["right"] == 8 * each, result


def test_eight_threads_load_models_and_pipelines_of_every_kind(tmp_path: Path) -> None:
    _check(tmp_path, 5, "installed", 290)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["direct", "installed"])
def test_a_thousand_mixed_loads(tmp_path: Path, mode: str) -> None:
    _check(tmp_path, 125, mode, 1190)
