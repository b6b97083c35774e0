"""Law 1 to the letter: loads that succeed, fail and are cancelled leave every attribute of every library as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.concurrency.watch import check, in_process


def test_nothing_is_written_and_nothing_is_left(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    files, temporary = tmp_path / "files", tmp_path / "tmp"
    files.mkdir()
    temporary.mkdir()
    result = in_process("audited_loads", files, temporary, timeout_s=400)
    check(result, "files", "threads", "left", looks=5)
    assert result["watched"] > 50_000 and result["loads"] >= 90, result
