"""One contender of one case, in this process: ``python -m benchmarks.child CASE CONTENDER FOLDER`` prints JSON."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from benchmarks import cases
from benchmarks.harness import PeakMemory


def main() -> None:
    """Set up, run, report. What a contender prints goes to stderr."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    case = cases.find(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        ready = case.contenders[sys.argv[2]](Path(sys.argv[3]))
        seconds = []
        with PeakMemory() as memory:
            for _ in range(case.loads):
                kept = None
                gc.collect()
                start = time.perf_counter()
                kept = ready()
                seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "peak_bytes": memory.above_start_bytes}), flush=True)
    del kept
    os._exit(0)  # what a library does at exit is nobody's load time


if __name__ == "__main__":
    main()
