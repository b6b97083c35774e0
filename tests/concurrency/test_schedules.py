"""Random schedules: any loads at the same time give right values, end, and leave nothing behind."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.concurrency import scenarios  # noqa: E402

scenario = st.builds(
    scenarios.Scenario,
    kind=st.sampled_from(scenarios.KINDS),
    ending=st.sampled_from(scenarios.ENDINGS),
    way=st.sampled_from([way for way in scenarios.WAYS if way != "fork"]),
    workers=st.sampled_from((1, 2, 8)),
    copy=st.booleans(),
    dtype=st.sampled_from(scenarios.DTYPES),
    cancel_at=st.integers(0, 40),
)


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """What hangs says where."""
    faulthandler.dump_traceback_later(500, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> scenarios.Files:
    return scenarios.prepare(tmp_path_factory.mktemp("files"))


def schedules(tmp_path: Path, *, threads: int, loads: int, seed: int, traced: bool = False) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.concurrency.schedules",
         str(tmp_path), str(threads), str(loads), str(seed), str(int(traced))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    result: dict[str, Any] = json.loads(done.stdout)
    for what in ("wrong", "files", "threads", "mapped"):
        assert result[what] == [], (result, done.stderr[-2000:])
    assert result["loads"] == loads // threads * threads
    return result


def test_two_hundred_random_loads(tmp_path: Path) -> None:
    schedules(tmp_path, threads=8, loads=200, seed=1)


def test_giving_way_at_every_line(tmp_path: Path) -> None:
    schedules(tmp_path, threads=4, loads=40, seed=2, traced=True)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_ten_thousand_random_loads(tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # the process has its own
    for seed in range(5):
        schedules(tmp_path / str(seed), threads=8, loads=2000, seed=100 + seed)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_giving_way_at_every_line_for_long(tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()
    for seed in range(3):
        schedules(tmp_path / str(seed), threads=6, loads=300, seed=seed, traced=True)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=st.lists(st.lists(scenario, min_size=1, max_size=2), min_size=2, max_size=5))
def test_schedules_that_hypothesis_picks(files: scenarios.Files, plan: list[list[scenarios.Scenario]]) -> None:
    faults: list[str] = []
    start = threading.Barrier(len(plan))

    def worker(todo: list[scenarios.Scenario]) -> None:
        start.wait()
        for one in todo:
            faults.extend(scenarios.run(one, files))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=worker, args=(todo,)) for todo in plan]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert faults == []


def test_an_event_loop_stays_responsive(files: scenarios.Files) -> None:
    """Twelve loads through asyncio.to_thread while the loop ticks."""
    one = scenarios.Scenario("tied", "done", "call", 2, True, None, 0)

    async def main() -> tuple[list[list[str]], int]:
        ticks, stop = 0, asyncio.Event()

        async def tick() -> None:
            nonlocal ticks
            while not stop.is_set():
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        found = await asyncio.gather(*(asyncio.to_thread(scenarios.run, one, files) for _ in range(12)))
        stop.set()
        await ticking
        return found, ticks

    found, ticks = asyncio.run(main())
    assert found == [[]] * 12 and ticks > 1


_EXIT = """
    import faulthandler, sys, threading, time
    faulthandler.dump_traceback_later(60, exit=True)
    import torch, weightlift as wl
    from tests.concurrency import scenarios
    from pathlib import Path
    files = scenarios.prepare(Path(sys.argv[1]))
    begun = threading.Event()
    def work():
        while True:
            wl.load(scenarios.Tied, files.single, copy=True, workers=4, progress=lambda done, total: begun.set())
    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    begun.wait()
    time.sleep({pause})
    {leave}
"""


@pytest.mark.parametrize(
    ("leave", "code", "pause"),
    [
        pytest.param("pass", 0, 0.05, id="returns"),
        pytest.param("sys.exit(3)", 3, 0.01, marks=pytest.mark.full),
        pytest.param("raise ValueError", 1, 0.02, marks=pytest.mark.full),
        pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", None, 0.03,
                     marks=pytest.mark.full, id="interrupt"),
    ],
)  # fmt: skip
def test_the_process_ends_in_mid_load(tmp_path: Path, leave: str, code: int | None, pause: float) -> None:
    """Daemon threads that load do not keep the process.

    torch itself aborts (SIGABRT, "terminate called") when daemon threads are in it while the interpreter ends: six of
    six times with nothing but ``nn.Linear(24, 24)`` in a loop. A thread that loads is better no daemon.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_EXIT.format(leave=leave, pause=pause)), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
    )  # fmt: skip
    assert done.returncode in ((code, -6) if code is not None else (1, 130, -2, -6)), done.stderr[-3000:]
    assert "Fatal" not in done.stderr
