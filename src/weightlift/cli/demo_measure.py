"""The demo's measurements: the ways to load its checkpoint, what each takes, and what memory it needs.

Memory is measured in a process of its own for each way (``python -m weightlift.cli.demo_measure``), because what a
process has given back and what it has only kept for reuse cannot be told apart afterwards.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import weightlift as wl
from weightlift.cli.demo_model import Config, Decoder

ORDINARY = "build, then load_state_dict"


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes that a load added: its own and those of mapped files afterwards, and all of it at the peak."""

    own_bytes: int
    mapped_bytes: int
    peak_bytes: int


def ways(folder: Path, config: Config) -> dict[str, Callable[[], nn.Module]]:
    """Name → load. The first is what the others are compared with."""
    return {
        ORDINARY: lambda: _ordinarily(folder, config),
        "weightlift": lambda: wl.load(lambda: Decoder(config), folder, progress=False),
        "weightlift, copy=True": lambda: wl.load(lambda: Decoder(config), folder, progress=False, copy=True),
    }


def _ordinarily(folder: Path, config: Config) -> nn.Module:
    """What one writes without a library: build with initialisers, read the shard files, copy."""
    from safetensors.torch import load_file

    model = Decoder(config)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    state["lm_head.weight"] = state["embed.weight"]
    model.load_state_dict(state)
    return model


def seconds_of(load: Callable[[], nn.Module]) -> tuple[float, float]:
    """Seconds until ``load`` returned, and until one element of every page of every weight had been read as well."""
    gc.collect()
    start = time.perf_counter()
    model = load()
    returned = time.perf_counter() - start
    touch(model)
    return returned, time.perf_counter() - start


def touch(model: nn.Module) -> None:
    """Read one element of every page."""
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
    for parameter in model.parameters():
        parameter.detach().view(-1)[:: page // parameter.element_size()].sum()


def memory_of(way: str, folder: Path, size_mb: float) -> Memory | None:
    """What one load adds to a fresh process; None where the system does not say."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-m", "weightlift.cli.demo_measure", way, str(folder), str(size_mb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return Memory(**json.loads(done.stdout))


def _main(way: str, folder: Path, size_mb: float) -> None:
    # What the first use of torch and of the library costs is no part of a load's memory.
    small = Config.of_size(1)
    state = Decoder(small).state_dict()
    touch(wl.load(lambda: Decoder(small), state, copy=True, strict=False))
    load = ways(folder, Config.of_size(size_mb))[way]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status()
    model = load()
    touch(model)
    after = _status()
    memory = Memory(
        own_bytes=max(after["RssAnon"] - before["RssAnon"], 0),
        mapped_bytes=max(after["RssFile"] - before["RssFile"], 0),
        peak_bytes=max(after["VmHWM"] - before["VmRSS"], 0),
    )
    print(json.dumps(asdict(memory)))


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("Rss", "VmRSS", "VmHWM"))
    }


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
