"""weightlift puts checkpoint weights into PyTorch modules: correct under threads, planned before a byte is read.

Names are imported when they are first asked for: ``import weightlift`` alone does not import torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlift.api import Deferred, LoadPlan, defer, load, plan
    from weightlift.checkpoint import Checkpoint, open_checkpoint
    from weightlift.checkpoint.entry import ShardFile, TensorEntry
    from weightlift.checkpoint.save import save
    from weightlift.deferred.construct import CurrentLoad, current_load
    from weightlift.errors import (
        CheckpointChanged,
        CheckpointCorrupt,
        CheckpointError,
        CheckpointNotFound,
        DeferError,
        LoadCancelled,
        PlanError,
        Problem,
        RanksError,
        TransferError,
        WeightliftError,
    )
    from weightlift.plan.report import LoadReport

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointChanged",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointNotFound",
    "CurrentLoad",
    "DeferError",
    "Deferred",
    "LoadCancelled",
    "LoadPlan",
    "LoadReport",
    "PlanError",
    "Problem",
    "RanksError",
    "ShardFile",
    "TensorEntry",
    "TransferError",
    "WeightliftError",
    "current_load",
    "defer",
    "load",
    "open_checkpoint",
    "plan",
    "save",
]

_HOMES = {
    "Checkpoint": "weightlift.checkpoint",
    "CheckpointChanged": "weightlift.errors",
    "CheckpointCorrupt": "weightlift.errors",
    "CheckpointError": "weightlift.errors",
    "CheckpointNotFound": "weightlift.errors",
    "CurrentLoad": "weightlift.deferred.construct",
    "DeferError": "weightlift.errors",
    "Deferred": "weightlift.api",
    "LoadCancelled": "weightlift.errors",
    "LoadPlan": "weightlift.api",
    "LoadReport": "weightlift.plan.report",
    "PlanError": "weightlift.errors",
    "Problem": "weightlift.errors",
    "RanksError": "weightlift.errors",
    "ShardFile": "weightlift.checkpoint.entry",
    "TensorEntry": "weightlift.checkpoint.entry",
    "TransferError": "weightlift.errors",
    "WeightliftError": "weightlift.errors",
    "current_load": "weightlift.deferred.construct",
    "defer": "weightlift.api",
    "load": "weightlift.api",
    "open_checkpoint": "weightlift.checkpoint",
    "plan": "weightlift.api",
    "save": "weightlift.checkpoint.save",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Two threads may come here at once: both get the same object, and either may be the one to store it.
    return globals().setdefault(name, getattr(importlib.import_module(home), name))


class _Package(types.ModuleType):
    """The import system would put the sub-package ``weightlift.plan`` where the function ``plan`` belongs."""

    @property
    def plan(self) -> Any:
        """`weightlift.api.plan`."""
        return __getattr__("plan")

    @plan.setter
    def plan(self, value: object) -> None:
        pass


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
