"""What is on disk: headers in, frozen records out. See `open_checkpoint`, `Checkpoint`, `save`, `verify`."""

from __future__ import annotations

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.entry import Format, ShardContents, ShardFile, TensorEntry
from weightlift.checkpoint.open import open_checkpoint, open_files
from weightlift.checkpoint.reader import require_unchanged
from weightlift.checkpoint.save import save
from weightlift.checkpoint.verify import verify

__all__ = [
    "Checkpoint",
    "Format",
    "ShardContents",
    "ShardFile",
    "TensorEntry",
    "open_checkpoint",
    "open_files",
    "require_unchanged",
    "save",
    "verify",
]
