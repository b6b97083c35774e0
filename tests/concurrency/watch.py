"""The rig of the tests that load on many threads: a process of its own, a bystander, and a look before and after."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tests.concurrency import audit
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


def _replaceable() -> tuple[object, ...]:
    """What other loaders replace while they load."""
    return nn.Module.register_parameter, torch.nn.init.normal_, torch.empty, torch.linspace, nn.Linear.__init__


class Bystander(threading.Thread):
    """Builds modules and reads torch's defaults for as long as the others load."""

    def __init__(self) -> None:
        super().__init__(name="bystander")
        self.stop = threading.Event()
        self.seen: list[str] = []
        self.looks = 0
        self.before = audit.ambient()
        self.patched = _replaceable()

    def run(self) -> None:
        while not self.stop.is_set():
            self.looks += 1
            layer = nn.Linear(4, 4)  # draws from the process's generator, which is why "rng" is left out below
            if layer.weight.is_meta or layer.weight.dtype != torch.float32 or not bool(layer.weight.abs().sum() > 0):
                self.seen.append(f"a linear layer: {layer.weight.device} {layer.weight.dtype}")
            now = audit.ambient()
            self.seen += [
                f"{what}: {now[what]}" for what in now if what not in ("rng",) and now[what] != self.before[what]
            ]
            if _replaceable() != self.patched:
                self.seen.append("a function of torch was replaced")


class Watched:
    """A block in which a bystander looks on; afterwards ``found`` says what differs from before."""

    def __enter__(self) -> Watched:
        gc.collect()
        self.found: dict[str, Any] = {}
        self._ambient, self._attributes = audit.ambient(), audit.attributes()
        self._files, self._threads = audit.open_files(), audit.threads()
        self._bystander = Bystander()
        self._bystander.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bystander.stop.set()
        self._bystander.join()
        gc.collect()
        after = audit.ambient()
        after["rng"] = self._ambient["rng"]  # the bystander's draws
        self.found = {
            "bystander": self._bystander.seen[:5],
            "looks": self._bystander.looks,
            "ambient": audit.differences(self._ambient, after),
            "attributes": audit.differences(self._attributes, audit.attributes()),
            "watched": len(self._attributes),
            "files": sorted(audit.open_files() - self._files),
            "threads": sorted(audit.threads() - self._threads),
        }


def on_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(number)`` on each thread, all beginning at once."""
    start = threading.Barrier(count)

    def begin(number: int) -> None:
        start.wait()
        work(number)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def answer(result: dict[str, Any]) -> None:
    """Print the result of a process of its own as JSON, and end it."""
    json.dump(result, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


def in_process(module: str, *arguments: object, timeout_s: float) -> dict[str, Any]:
    """Run a module of this folder in a process of its own; its `answer`."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.concurrency.{module}", *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check(result: dict[str, Any], *empty: str, looks: int = 10) -> None:
    """Nothing wrong, nobody disturbed, nothing written; ``empty`` names what else must be."""
    for what in ("wrong", "bystander", "ambient", "attributes", *empty):
        assert not result[what], result
    assert result["looks"] > looks, result
