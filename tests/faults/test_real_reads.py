"""The operating system's own faults, made by a shim that is preloaded into a process: an error or the right value."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_loads import expected
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("cc")

pytestmark = pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C compiler")
WAYS = 14  # seven ways, two formats


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O1", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint")
    save_file(expected(), made / "model.safetensors")
    torch.save(expected(), made / "model.pt")
    sums = subprocess.run(["sha256sum", "model.safetensors", "model.pt"], cwd=made, capture_output=True, check=True)
    (made / "SHA256SUMS").write_bytes(sums.stdout)
    return made


def run(shim: Path, folder: Path, fault: str, at: int = 0) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.fault_loads", str(folder), fault, str(at)],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == WAYS
    return told


FULL = pytest.mark.full


@pytest.mark.parametrize("fault", ["short", pytest.param("eintr", marks=FULL), pytest.param("slow", marks=FULL)])
def test_faults_that_a_repeated_read_mends(shim: Path, folder: Path, fault: str) -> None:
    assert [line for line in run(shim, folder, fault) if line["outcome"] != "right"] == []


@pytest.mark.parametrize("fault", ["eio", pytest.param("eof", marks=pytest.mark.full)])
def test_a_place_that_cannot_be_read(shim: Path, folder: Path, fault: str) -> None:
    at = 1_000_000  # within the big tensor of both files, behind the header of the first
    told = run(shim, folder, fault, at)
    for line in told:
        if line["way"] == "mapped" and line["suffix"] == ".safetensors":
            assert line["outcome"] == "right"  # pages don't come through read
            continue
        if line["way"] == "mapped" and line["outcome"] == "right":
            continue
        assert line["outcome"] in ("TransferError", "CheckpointError"), line
        if fault == "eof" and line["suffix"] == ".pt":
            assert "the zip is damaged" in line["text"] or "not of torch.save" in line["text"], line
            continue
        assert line["file"].endswith(line["suffix"]) and int(line["start"]) <= at <= int(line["end"]), line
        assert line["key"] == "big" or line["way"] == "hashed", line
        assert "Input/output error" in line["text"] if fault == "eio" else "ends" in line["text"], line


@pytest.mark.full
def test_a_header_that_cannot_be_read(shim: Path, folder: Path) -> None:
    for fault in ("eio", "eof"):
        for line in run(shim, folder, fault, 12):
            assert line["outcome"] == "CheckpointError", line
            assert "Input/output error" in line["text"] if fault == "eio" else "too early" in line["text"], line


def test_a_file_that_cannot_be_mapped(shim: Path, folder: Path) -> None:
    for line in run(shim, folder, "map"):
        if line["way"] in ("mapped", "hashed"):
            assert line["outcome"] == "TransferError" and "copy=True reads it instead" in line["text"], line
        else:
            assert line["outcome"] == "right", line
