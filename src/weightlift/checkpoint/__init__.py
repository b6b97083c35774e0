"""What is on disk: headers in, frozen records out. See `open_checkpoint`, `Checkpoint`, `verify`."""

from __future__ import annotations

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open import open_checkpoint, open_files
from weightlift.checkpoint.verify import verify

__all__ = ["Checkpoint", "open_checkpoint", "open_files", "verify"]
