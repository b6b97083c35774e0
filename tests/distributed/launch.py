"""Starts ranks as processes of their own, with a watchdog, and brings back what they report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]


def launch(
    scenarios: str, ranks: int, *, names: tuple[str, ...] = (), timeout_s: float = 300, **env: str
) -> list[dict]:
    """Run the functions of ``tests.distributed.<scenarios>`` on ``ranks`` ranks; for each rank a dictionary from name
    to "ok" or a traceback. A rank that was killed reports what it had done until then, and ``exit`` says how it ended.
    """
    # Held by this process, as torchrun's agent does: no rank takes it along when it dies.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "WEIGHTLIFT_GUARD_RESERVATIONS": "1",
                "SCENARIO_FOLDER": folder,
                "SCENARIO_TIMEOUT": str(timeout_s),
                **env,
            }
            command = [sys.executable, "-m", "tests.distributed.rank", scenarios, str(store.port), *names]
            with open(Path(folder) / f"log{rank}", "wb") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
                )
        try:
            until = time.monotonic() + timeout_s
            for process in processes:
                process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [_report(Path(folder), rank, process.returncode) for rank, process in enumerate(processes)]


def _report(folder: Path, rank: int, code: int | None) -> dict:
    path = folder / f"report{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    report = dict(map(json.loads, lines))
    report["exit"] = code
    report["log"] = (folder / f"log{rank}").read_text()[-4000:]
    return report
