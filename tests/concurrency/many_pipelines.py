"""Threads load pipelines of Diffusers at once, each several components in threads of its own, while a bystander builds
modules. Run by test_pipeline_threads.py in a process of its own:
``python -m tests.concurrency.many_pipelines FOLDER THREADS LOADS (direct | installed)``; prints what it saw as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffusers import DiffusionPipeline
from tests.concurrency.saved_models import DTYPES, Job, main
from tests.parity import diffusers_pipelines
from tests.parity.diffusers_compare import pipeline_differences


def jobs(folder: Path) -> Iterator[Job]:
    """Each kind in each dtype."""
    for name in diffusers_pipelines.PIPELINES:
        path = diffusers_pipelines.save(name, folder)
        for dtype in DTYPES:
            yield Job(DiffusionPipeline, path, {"dtype": dtype}, pipeline_differences)


if __name__ == "__main__":
    main(jobs, limit_s=550)
