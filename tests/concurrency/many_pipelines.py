"""Threads load pipelines of Diffusers at once, each several components in threads of its own, while a bystander builds
modules. Run by test_pipeline_threads.py in a process of its own:
``python -m tests.concurrency.many_pipelines FOLDER THREADS LOADS (direct | installed)``; prints what it saw as JSON.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (its attributes are watched)
import diffusers
import torch
import transformers
from tests.concurrency import watch
from tests.parity import diffusers_pipelines
from tests.parity.compare import native_only
from tests.parity.diffusers_compare import pipeline_differences

import weightlift as wl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> None:
    folder, thread_count, loads, mode = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    faulthandler.dump_traceback_later(550, exit=True)  # what hangs says where
    warnings.simplefilter("ignore")
    for library in ("transformers", "diffusers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    jobs = []
    for name in diffusers_pipelines.PIPELINES:
        path = diffusers_pipelines.save(name, folder)
        jobs += [(path, dtype, diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype)) for dtype in DTYPES]
    if mode == "installed":
        wl.install()
    for path, dtype, _ in jobs:  # imports and caches of others come to rest
        load(path, dtype, mode)
    sys.setswitchinterval(1e-4)
    wrong: list[str] = []
    done = [0] * thread_count

    def worker(number: int) -> None:
        for turn in range(loads):
            path, dtype, expected = jobs[(7 * number + turn) % len(jobs)]
            try:
                pipe = load(path, dtype, mode)
                found = [f"{path.name}, {dtype}: {item}" for item in pipeline_differences(pipe, expected)]
            except Exception:
                found = [traceback.format_exc()[-900:]]
            wrong.extend(found)
            done[number] += not found

    with watch.Watched() as watched, native_only():
        watch.on_threads(thread_count, worker)
    watch.answer({"right": sum(done), "wrong": wrong[:5], **watched.found})


def load(path: Path, dtype: torch.dtype, mode: str) -> Any:
    """As a program would, with and without the drop-in."""
    if mode == "installed":
        return diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype)
    return wl.from_pretrained(diffusers.DiffusionPipeline, path, dtype=dtype)


if __name__ == "__main__":
    main()
