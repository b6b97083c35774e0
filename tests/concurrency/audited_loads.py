"""Loads that succeed, fail and are cancelled, with everything recorded before, during and after. Run by
test_state_audit.py in a process of its own: ``python -m tests.concurrency.audited_loads FOLDER``; prints JSON.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import tempfile
from pathlib import Path

import accelerate  # noqa: F401  (the attributes of these are watched)
import diffusers.models.modeling_utils  # noqa: F401
import transformers.modeling_utils  # noqa: F401
from tests.concurrency import audit, scenarios, watch

import weightlift as wl


def all_scenarios() -> list[scenarios.Scenario]:
    """Every kind with every ending, both with and without copies."""
    return [
        scenarios.Scenario(kind, ending, way, 3, copy, None, 3)
        for kind in scenarios.KINDS
        for ending in dict.fromkeys(scenarios.ENDINGS)
        for way, copy in (("call", False), ("plan", True))
    ]


def left_over(folder: Path) -> dict[str, int]:
    """What a leak would show in."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "mappings of ours": sum(str(folder) in line for line in maps),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
        "files of the folder": sum(len(names) for _, _, names in os.walk(folder)),
    }


def main() -> None:
    faulthandler.dump_traceback_later(300, exit=True)
    os.environ["TMPDIR"] = sys.argv[2]
    folder = Path(sys.argv[1])
    files = scenarios.prepare(folder)
    for one in all_scenarios()[:8]:
        scenarios.run(one, files)  # what is imported and cached at first use is not a leak
    wl.save(files.state, folder / "again")
    gc.collect()
    left = left_over(folder)
    wrong: list[str] = []
    todo = all_scenarios()

    def worker(number: int) -> None:
        for one in todo[number::4]:
            wrong.extend(scenarios.run(one, files))

    with watch.Watched() as watched:
        watch.on_threads(4, worker)
        wl.save(files.state, folder / "again")
    found = {"loads": len(todo), "wrong": wrong[:5], "left": audit.differences(left, left_over(folder))}
    watch.answer({**found, **watched.found})


if __name__ == "__main__":
    main()
