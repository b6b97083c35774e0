"""Threads load whatever there is at once: models of Transformers and Diffusers, pipelines, single files.

Run by test_mixed_threads.py in a process of its own:
``python -m tests.concurrency.many_mixed FOLDER THREADS LOADS (direct | installed)``; prints what it saw as JSON.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (its attributes are watched)
import diffusers
import torch
import transformers
from tests.concurrency import watch
from tests.concurrency.many_pretrained import DTYPES, models
from tests.parity import compare, diffusers_pipelines, single_file_pipelines, single_files
from tests.parity.diffusers_compare import differences, pipeline_differences

import weightlift as wl

SINGLE = ("UNet2DConditionModel", "SD3Transformer2DModel", "AutoencoderDC")
SINGLE_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass
class Job:
    """One load: of a class, by one of its methods; and how its result is told from what it should be."""

    cls: Any
    method: str
    given: Path
    options: dict[str, Any]
    compare: Callable[[Any, Any], list[str]]
    expected: Any = None

    def run(self, mode: str) -> Any:
        """As a program would, with and without the drop-in."""
        if mode == "installed":
            return getattr(self.cls, self.method)(str(self.given), **self.options)
        return getattr(wl, self.method)(self.cls, str(self.given), **self.options)


def jobs(folder: Path) -> Iterator[Job]:
    """All kinds, in each dtype."""
    torch.manual_seed(1)
    for name, model in models().items():
        model.save_pretrained(folder / name)
    pipelines = {name: diffusers_pipelines.save(name, folder) for name in ("stable_diffusion_xl", "flux")}
    files = {}
    for name in SINGLE:
        (folder / name).mkdir()
        layout = single_files.LAYOUTS.get(name, single_files.Layout())
        files[name] = single_files.save(single_files.model(name, layout), name, folder / name, layout)
    whole = {name: single_file_pipelines.save(name, folder) for name in SINGLE_PIPELINES}
    for dtype in DTYPES:
        for name, model in models().items():
            yield Job(type(model), "from_pretrained", folder / name, {"dtype": dtype}, compare.differences)
        for path in pipelines.values():
            yield Job(diffusers.DiffusionPipeline, "from_pretrained", path, {"dtype": dtype}, pipeline_differences)
            yield Job(
                diffusers.AutoencoderKL, "from_pretrained", path, {"dtype": dtype, "subfolder": "vae"}, differences
            )
        for name, file in files.items():
            options = {"config": str(folder / name / "configuration"), "torch_dtype": dtype}
            yield Job(getattr(diffusers, name), "from_single_file", file, options, differences)
        for name, (file, configuration) in whole.items():
            options = {"config": str(configuration), "torch_dtype": dtype}
            yield Job(getattr(diffusers, name), "from_single_file", file, options, pipeline_differences)


def main() -> None:
    folder, thread_count, loads, mode = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    faulthandler.dump_traceback_later(1150, exit=True)  # what hangs says where
    warnings.simplefilter("ignore")
    for library in ("transformers", "diffusers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    todo = list(jobs(folder))
    for job in todo:
        job.expected = getattr(job.cls, job.method)(str(job.given), **job.options)
    if mode == "installed":
        wl.install()
    for job in todo:  # imports and caches of others come to rest
        job.run(mode)
    sys.setswitchinterval(1e-4)
    wrong: list[str] = []
    done = [0] * thread_count

    def worker(number: int) -> None:
        for turn in range(loads):
            job = todo[(7 * number + turn) % len(todo)]
            try:
                found = job.compare(job.run(mode), job.expected)
            except Exception:
                found = [traceback.format_exc()[-900:]]
            wrong.extend(f"{job.cls.__name__}.{job.method}, {job.options}: {item}" for item in found)
            done[number] += not found

    with watch.Watched() as watched, compare.native_only():
        watch.on_threads(thread_count, worker)
    watch.answer({"right": sum(done), "wrong": wrong[:5], **watched.found})


if __name__ == "__main__":
    main()
