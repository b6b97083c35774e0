"""Thousands of random loads on many threads with forced switches. Run by test_schedules.py as
``python -m tests.concurrency.schedules FOLDER THREADS LOADS SEED TRACED``; prints JSON.

With TRACED, threads also give way at random lines of weightlift's own code. A watchdog dumps every thread's stack and
ends the process when two minutes pass in which no load ends.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tests.concurrency import audit, scenarios

_OURS = os.sep + "weightlift" + os.sep
_STALL_SECONDS = 120


def draw(rng: random.Random, *, forks: bool) -> scenarios.Scenario:
    """A random scenario."""
    way = rng.choice(scenarios.WAYS)
    return scenarios.Scenario(
        kind=rng.choice(scenarios.KINDS),
        ending=rng.choice(scenarios.ENDINGS),
        way=way if way != "fork" or (forks and rng.random() < 0.1) else "call",
        workers=rng.choice((1, 2, 3, 8)),
        copy=rng.random() < 0.5,
        dtype=rng.choice(scenarios.DTYPES),
        cancel_at=rng.randrange(40),
    )


def giving_way(seed: int) -> Any:
    """A trace function that lets other threads go first at random lines of ours."""
    rng = random.Random(seed)

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if rng.random() < 0.05:
            time.sleep(0)
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        return line if _OURS in frame.f_code.co_filename else None

    return call


def main() -> None:
    folder, thread_count, loads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    seed, traced = int(sys.argv[4]), sys.argv[5] == "1"
    files = scenarios.prepare(folder)
    sys.setswitchinterval(1e-6)
    gc.collect()
    before, names = audit.open_files(), audit.threads()
    wrong: list[str] = []
    done = [0] * thread_count
    drawn: list[str] = []

    def worker(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        if traced:
            sys.settrace(giving_way(seed + number))
        while done[number] < loads // thread_count:
            scenario = draw(rng, forks=not traced)
            drawn.append(scenario.ending if scenario.way != "fork" else "fork")
            try:
                wrong.extend(scenarios.run(scenario, files))
            except BaseException as error:
                wrong.append(f"{scenario}: {error!r}")
            done[number] += 1

    if traced:
        threading.settrace(giving_way(seed))
    workers = [threading.Thread(target=worker, args=(number,), daemon=True) for number in range(thread_count)]
    for thread in workers:
        thread.start()
    seen = -1
    while any(thread.is_alive() for thread in workers):
        if sum(done) != seen:
            seen = sum(done)
            faulthandler.dump_traceback_later(_STALL_SECONDS, exit=True)
        time.sleep(0.2)
    threading.settrace(None)  # type: ignore[arg-type]
    gc.collect()
    folder_lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    json.dump(
        {
            "loads": sum(done),
            "wrong": wrong[:5],
            "files": sorted(audit.open_files() - before),
            "threads": sorted(name for name in audit.threads() - names if not name.startswith("asyncio")),
            "mapped": folder_lines[:5],
            "endings": {ending: drawn.count(ending) for ending in sorted(set(drawn))},
        },
        sys.stdout,
    )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
