"""Deferred construction gives what ordinary construction gives: one test per case and mode (see cases.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, /proc and reserved mappings")
TESTS = Path(__file__).resolve().parent.parent
SOURCE = TESTS.parent / "src"
KNOWN = cases.everything()
NAMES = list(KNOWN)
UNGUARDED = [n for n, c in KNOWN.items() if not getattr(c, "guarded_only", False)]


def _run(folder: Path, names: list[str], *, guarded: bool) -> dict[str, Any]:
    """One child process for all the wanted cases; its report."""
    wanted, out = folder / "names.txt", folder / "report.json"
    wanted.write_text("\n".join(names))
    environment = {k: v for k, v in os.environ.items() if k != "WEIGHTLIFT_GUARD_RESERVATIONS"}
    path = [environment.get("PYTHONPATH"), str(TESTS), str(SOURCE)]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if guarded:
        environment["WEIGHTLIFT_GUARD_RESERVATIONS"] = "1"
    jobs = os.environ.get("WEIGHTLIFT_CONFORMANCE_JOBS", "2")
    command = [sys.executable, "-m", "conformance.runner", "--jobs", jobs]
    command += ["--names-from", str(wanted), "--out", str(out), *([] if guarded else ["--short"])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    if done.returncode or not out.exists():
        pytest.fail(f"the runner itself failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def _wanted(request: pytest.FixtureRequest, function: str) -> list[str]:
    """The cases that this session selected (`-k`, a node id), not the whole registry."""
    chosen = [item for item in request.session.items if getattr(item, "originalname", "") == function]
    return [item.callspec.params["name"] for item in chosen]


@pytest.fixture(scope="module")
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("guarded"), _wanted(request, "test_guarded"), guarded=True)


@pytest.fixture(scope="module")
def unguarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("unguarded"), _wanted(request, "test_unguarded"), guarded=False)


def _check(report: dict[str, Any], name: str) -> None:
    assert name in report, f"the runner did not report on {name}"
    failures = report[name]["failures"]
    if failures:
        pytest.fail(f"{name}: {len(failures)} differences\n  - " + "\n  - ".join(failures[:25]), pytrace=False)


@pytest.mark.parametrize("name", NAMES)
def test_guarded(name: str, guarded: dict[str, Any]) -> None:
    """A process of its own, reservations inaccessible: an unseen read is SIGSEGV."""
    _check(guarded, name)


@pytest.mark.parametrize("name", UNGUARDED)
def test_unguarded(name: str, unguarded: dict[str, Any]) -> None:
    """As users run it; cases of one theme share a process, so what one leaves behind shows in the next."""
    _check(unguarded, name)
