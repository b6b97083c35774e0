"""weightlift puts checkpoint weights into PyTorch modules: correct under threads, planned before a byte is read."""

from weightlift.api import Deferred, LoadPlan, defer, load, plan
from weightlift.checkpoint import Checkpoint, open_checkpoint
from weightlift.checkpoint.entry import ShardFile, TensorEntry
from weightlift.deferred.construct import CurrentLoad, current_load
from weightlift.errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointNotFound,
    DeferError,
    LoadCancelled,
    PlanError,
    Problem,
    TransferError,
    WeightliftError,
)
from weightlift.plan.report import LoadReport

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointChanged",
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
    "ShardFile",
    "TensorEntry",
    "TransferError",
    "WeightliftError",
    "current_load",
    "defer",
    "load",
    "open_checkpoint",
    "plan",
]
