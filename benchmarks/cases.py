"""The list of cases, each in a file of its own; a file is imported when one of its cases is asked for."""

from __future__ import annotations

import importlib

from benchmarks.harness import Case

FILES = {
    "same-dtype": "warm", "up-cast": "warm", "down-cast": "warm", "copy": "warm",
    "cold": "cold",
    "experts": "experts",
    "tied": "tied", "tied-up-cast": "tied",
    "tensors-18k": "small_tensors", "tensors-91k": "small_tensors", "layers-18k": "small_tensors",
    "ordinary": "ordinary_module", "ordinary-narrow": "ordinary_module",
    "threads": "threads",
    "sizes": "sizes",
    "pipeline": "pipeline", "pipeline-cast": "pipeline", "pipeline-read": "pipeline",
    "saved-by-ranks": "saved_by_ranks",
    "fresh-process": "fresh_process",
    "accelerator": "accelerator",
}  # fmt: skip


def find(name: str) -> Case:
    """A case by its name. Raises KeyError."""
    module = importlib.import_module(f"benchmarks.{FILES[name]}")
    return next(case for case in module.CASES if case.name == name)
