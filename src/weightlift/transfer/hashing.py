"""Hashing files on the same threads, and at the same time, as their tensors are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from weightlift.checkpoint.entry import ShardFile
from weightlift.checkpoint.integrity import Digest, content_digest, difference
from weightlift.errors import CheckpointChanged, CheckpointCorrupt, CheckpointError, Problem, TransferError
from weightlift.transfer.jobs import Task
from weightlift.transfer.sources import Source


class Hashing:
    """A task a file; `require` raises for all files together once the tasks are done.

    Reading and hashing meet in the system's page cache, so that the disk gives every byte once.
    """

    def __init__(
        self,
        source: Source,
        files: Sequence[ShardFile],
        digests: Mapping[Path, Digest],
        cancel: threading.Event | None,
    ) -> None:
        self._source = source
        self._cancel = cancel
        self._problems: list[Problem] = []
        self.tasks = tuple(
            Task(str(file.path), file.size_bytes, self._task(file, digests[file.path]), "hash")
            for file in files
            if file.path in digests
        )

    def require(self) -> None:
        """Raise `CheckpointCorrupt` if a file's content is not what its hash says."""
        if self._problems:
            raise CheckpointCorrupt("the content of the checkpoint is not what it should be", self._problems)

    def _task(self, file: ShardFile, digest: Digest) -> Callable[[], None]:
        def run() -> None:
            try:
                problem = difference(file.path, digest, self._hash(file, digest))
            except CheckpointChanged:
                raise
            except CheckpointError as error:
                raise TransferError("loading failed", error.problems) from error
            except OSError as error:
                wrong = Problem(f"reading it to hash it failed: {error}", file=file.path, start=0, end=file.size_bytes)
                raise TransferError("loading failed", [wrong]) from error
            if problem is not None:
                self._problems.append(problem)  # atomic, with and without an interpreter lock

        return run

    def _hash(self, file: ShardFile, digest: Digest) -> str:
        handle = self._source.open(file)
        try:
            found = content_digest(handle.readinto, file.path, file.size_bytes, digest, self._cancel)
            changed = handle.changed()
        finally:
            handle.close()
        if changed is not None:
            raise CheckpointChanged("a checkpoint file changed while it was read", [changed])
        return found
