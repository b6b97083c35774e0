"""Threads load whatever there is at once: models of Transformers and Diffusers, pipelines, single files.

Run by test_mixed_threads.py in a process of its own:
``python -m tests.concurrency.many_mixed FOLDER THREADS LOADS (direct | installed)``; prints what it saw as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
from tests.concurrency import many_pretrained
from tests.concurrency.saved_models import DTYPES, Job, main
from tests.parity import diffusers_pipelines, single_file_pipelines, single_files
from tests.parity.diffusers_compare import differences, pipeline_differences

SINGLE = ("UNet2DConditionModel", "SD3Transformer2DModel", "AutoencoderDC")
SINGLE_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def jobs(folder: Path) -> Iterator[Job]:
    """All kinds, in each dtype."""
    yield from many_pretrained.jobs(folder)
    for name in ("stable_diffusion_xl", "flux"):
        path = diffusers_pipelines.save(name, folder)
        for dtype in DTYPES:
            yield Job(diffusers.DiffusionPipeline, path, {"dtype": dtype}, pipeline_differences)
            yield Job(diffusers.AutoencoderKL, path, {"dtype": dtype, "subfolder": "vae"}, differences)
    for name in SINGLE:
        (folder / name).mkdir()
        layout = single_files.LAYOUTS.get(name, single_files.Layout())
        file = single_files.save(single_files.model(name, layout), name, folder / name, layout)
        yield from _single(name, file, folder / name / "configuration", differences)
    for name in SINGLE_PIPELINES:
        yield from _single(name, *single_file_pipelines.save(name, folder), pipeline_differences)


def _single(name: str, file: Path, configuration: Path, compare: Callable[[Any, Any], list[str]]) -> Iterator[Job]:
    for dtype in DTYPES:
        options = {"config": str(configuration), "torch_dtype": dtype}
        yield Job(getattr(diffusers, name), file, options, compare, "from_single_file")


if __name__ == "__main__":
    main(jobs, limit_s=1150)
