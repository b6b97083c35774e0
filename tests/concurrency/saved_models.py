"""The program that many_pretrained, many_pipelines and many_mixed are: threads load saved models of every kind at once,
while a bystander builds modules, and each result is compared with what the model's own library makes of it."""

from __future__ import annotations

import faulthandler
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (its attributes are watched)
import torch
from tests.concurrency import watch
from tests.parity.compare import native_only

import weightlift as wl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Job:
    """One load: of a class, by one of its methods; and how its result is told from what it should be."""

    cls: Any
    given: Path
    options: dict[str, Any]
    compare: Callable[[Any, Any], list[str]]
    method: str = "from_pretrained"
    expected: Any = None

    def theirs(self) -> Any:
        """By the class's own method, whoever that leads to."""
        return getattr(self.cls, self.method)(str(self.given), **self.options)

    def run(self, mode: str) -> Any:
        """As a program would, with and without the drop-in."""
        if mode == "installed":
            return self.theirs()
        return getattr(wl, self.method)(self.cls, str(self.given), **self.options)

    def problems(self, mode: str) -> list[str]:
        """Load; what is wrong with the result."""
        try:
            found = self.compare(self.run(mode), self.expected)
        except Exception:
            found = [traceback.format_exc()[-900:]]
        return [f"{self.cls.__name__}.{self.method}, {self.options}: {item}" for item in found]


def main(save: Callable[[Path], Iterable[Job]], *, limit_s: float) -> None:
    """``FOLDER THREADS LOADS (direct | installed)`` are the program's arguments: save models into the folder, let each
    thread do that many of the jobs, and print what was seen as JSON. Ends the process after ``limit_s``."""
    folder, thread_count, loads, mode = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    faulthandler.dump_traceback_later(limit_s, exit=True)  # what hangs says where
    _be_quiet()
    torch.manual_seed(1)
    known = list(save(folder))
    turns = [[(7 * number + turn) % len(known) for turn in range(loads)] for number in range(thread_count)]
    jobs = [known[place] for place in sorted({place for places in turns for place in places})]
    for job in jobs:
        job.expected = job.theirs()
    if mode == "installed":
        wl.install()
    for job in jobs:  # imports and caches of others come to rest
        job.run(mode)
    sys.setswitchinterval(1e-4)
    wrong: list[str] = []
    done = [0] * thread_count

    def worker(number: int) -> None:
        for place in turns[number]:
            found = known[place].problems(mode)
            wrong.extend(found)
            done[number] += not found

    with watch.Watched() as watched, native_only():
        watch.on_threads(thread_count, worker)
    watch.answer({"right": sum(done), "wrong": wrong[:5], **watched.found})


def _be_quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
        if name in sys.modules:
            sys.modules[name].utils.logging.disable_progress_bar()
