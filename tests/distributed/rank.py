"""One rank: runs scenarios one after the other and writes down how each ended."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from tests.distributed.ending import leave


def main() -> None:
    module, port, *names = sys.argv[1:]
    faulthandler.dump_traceback_later(float(os.environ["SCENARIO_TIMEOUT"]) - 5, exit=True)
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", int(port), is_master=False)
    store = dist.PrefixStore("ranks", store)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store, timeout=timedelta(seconds=60))
    scenarios = importlib.import_module(f"tests.distributed.{module}").SCENARIOS
    path = os.path.join(os.environ["SCENARIO_FOLDER"], f"report{rank}")
    for name, run in scenarios.items():
        if names and name not in names:
            continue
        try:
            run()
            outcome = "ok"
        except BaseException:
            outcome = traceback.format_exc()
        with open(path, "a") as report:
            report.write(json.dumps([name, outcome]) + "\n")
        dist.barrier()
    leave()


if __name__ == "__main__":
    main()
