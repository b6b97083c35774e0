"""Loads a small checkpoint in many ways, in a process whose reads a shim spoils. Run by test_real_reads.py.

Prints one JSON line a way: "right", "wrong" (the only outcome that must never be), or the error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import weightlift as wl


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Parameter(torch.zeros(600, 700))
        self.small = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in range(3, 40))


def expected() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(value.shape, generator=generator) for key, value in Net().state_dict().items()}


def read_all(checkpoint: wl.Checkpoint) -> dict[str, torch.Tensor]:
    return {key: checkpoint.read(key) for key in checkpoint}


def ways(path: Path) -> dict[str, Callable[[], Any]]:
    return {
        "mapped": lambda: wl.load(Net, path),
        "copied": lambda: wl.load(Net, path, copy=True, workers=3),
        "copied by one": lambda: wl.load(Net, path, copy=True, workers=1),
        "cast": lambda: wl.load(Net, path, dtype=torch.float64, workers=3),
        "in place": lambda: wl.load(Net(), path, workers=3),
        "read": lambda: read_all(wl.open_checkpoint(path)),
        "hashed": lambda: wl.load(Net, path, verify=True),
    }


def main() -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    folder, fault, at = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    right = expected()
    os.environ |= {"WL_FAULT": fault, "WL_FAULT_AT": at, "WL_FAULT_NAME": "model."}
    for path in sorted(folder.glob("model.*")):
        for name, way in ways(path).items():
            try:
                made = way()
                state = made if isinstance(made, dict) else made.state_dict()
                equal = all(torch.equal(state[key].float(), right[key]) for key in right)
                told = {"outcome": "right" if equal else "wrong"}
            except wl.WeightliftError as error:
                problem = error.problems[0]
                told = {"outcome": type(error).__name__, "text": str(error), "file": str(problem.file)}
                told |= {"key": str(problem.key), "start": str(problem.start), "end": str(problem.end)}
            print(json.dumps({"way": name, "suffix": path.suffix, **told}))


if __name__ == "__main__":
    main()
