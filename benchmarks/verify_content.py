"""What ``verify=True`` costs: a load with and without, in turns, files in the page cache."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import weightlift as wl


def build() -> nn.Module:
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(24)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = {f"{i}.weight": torch.randn(2048, 2048) for i in range(24)}
        wl.save(state, folder, max_shard_bytes=110_000_000, manifest=True)
        nbytes = wl.open_checkpoint(folder).total_bytes
        ways = {(copy, verify): [] for copy in (False, True) for verify in (False, True)}
        for _ in range(rounds):
            for (copy, verify), seconds in ways.items():
                start = time.perf_counter()
                wl.load(build, folder, copy=copy, verify=verify)
                seconds.append(time.perf_counter() - start)
        print(f"{nbytes / 1e6:.0f} MB in 4 files, median of {rounds} rounds, load average {os.getloadavg()[0]:.1f}")
        for (copy, verify), seconds in ways.items():
            middle = statistics.median(seconds)
            print(f"copy={copy!s:5}  verify={verify!s:5}  {middle:.3f} s  (lowest {min(seconds):.3f} s)")


if __name__ == "__main__":
    main()
