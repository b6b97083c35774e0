"""weightlift puts checkpoint weights into PyTorch modules: correct under threads, planned before a byte is read.

Names are imported when they are first asked for: ``import weightlift`` alone does not import torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlift.api import defer, load, plan
    from weightlift.capture import Declared, Input, Output, Records, capture, recorder, records
    from weightlift.checkpoint import Checkpoint, open_checkpoint
    from weightlift.checkpoint.entry import ShardFile, TensorEntry
    from weightlift.checkpoint.save import save
    from weightlift.deferred.construct import CurrentLoad, current_load
    from weightlift.errors import (
        CaptureError,
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
    from weightlift.handles import Deferred, LoadPlan
    from weightlift.integrations import from_pretrained, from_single_file, install, uninstall
    from weightlift.plan.report import LoadReport
    from weightlift.transfer.mapped import mapped_files
    from weightlift.transfer.reuse import empty_cache

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Checkpoint",
    "CheckpointChanged",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointNotFound",
    "CurrentLoad",
    "Declared",
    "DeferError",
    "Deferred",
    "Input",
    "LoadCancelled",
    "LoadPlan",
    "LoadReport",
    "Output",
    "PlanError",
    "Problem",
    "RanksError",
    "Records",
    "ShardFile",
    "TensorEntry",
    "TransferError",
    "WeightliftError",
    "capture",
    "current_load",
    "defer",
    "empty_cache",
    "from_pretrained",
    "from_single_file",
    "install",
    "load",
    "mapped_files",
    "open_checkpoint",
    "plan",
    "recorder",
    "records",
    "save",
    "uninstall",
]

_HOMES = {
    name: f"weightlift.{module}"
    for module, names in {
        "api": "defer load plan",
        "capture": "Declared Input Output Records capture recorder records",
        "checkpoint": "Checkpoint open_checkpoint",
        "checkpoint.entry": "ShardFile TensorEntry",
        "checkpoint.save": "save",
        "deferred.construct": "CurrentLoad current_load",
        "errors": "CaptureError CheckpointChanged CheckpointCorrupt CheckpointError CheckpointNotFound DeferError"
        " LoadCancelled PlanError Problem RanksError TransferError WeightliftError",
        "handles": "Deferred LoadPlan",
        "integrations": "from_pretrained from_single_file install uninstall",
        "plan.report": "LoadReport",
        "transfer.mapped": "mapped_files",
        "transfer.reuse": "empty_cache",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Two threads may come here at once: both get the same object, and either may be the one to store it.
    return globals().setdefault(name, getattr(importlib.import_module(home), name))


class _Package(types.ModuleType):
    """The import system would put the sub-packages ``plan`` and ``capture`` where the functions belong."""

    @property
    def capture(self) -> Any:
        """`weightlift.capture.api.capture`."""
        return globals().get("capture") or __getattr__("capture")

    @capture.setter
    def capture(self, value: object) -> None:
        pass

    @property
    def plan(self) -> Any:
        """`weightlift.api.plan`."""
        return globals().get("plan") or __getattr__("plan")

    @plan.setter
    def plan(self, value: object) -> None:
        pass


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


sys.modules[__name__].__class__ = _Package
