"""Many threads load Transformers models: every one is right, nothing of the process changes, nobody is disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.concurrency.watch import check, in_process


def _loads(folder: Path, each: int, mode: str) -> None:
    result = in_process("many_pretrained", folder, 8, each, mode, timeout_s=590)
    assert result["right"] == 8 * each, result
    check(result)


@pytest.mark.parametrize("mode", ["direct", "installed"])
def test_eight_threads_load_models_of_several_classes(tmp_path: Path, mode: str) -> None:
    _loads(tmp_path, 8, mode)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["direct", "installed"])
def test_a_thousand_loads(tmp_path: Path, mode: str) -> None:
    _loads(tmp_path, 125, mode)
