"""A bound on memory that several threads take for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Budget:
    """Lets work in while what is held stays within the bound; work larger than that runs alone. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._change = threading.Condition()

    @contextlib.contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Wait until ``nbytes`` fit, and hold them for a block of code."""
        with self._change:
            self._change.wait_for(lambda: self._held_bytes == 0 or self._held_bytes + nbytes <= self._limit_bytes)
            self._held_bytes += nbytes
        try:
            yield
        finally:
            with self._change:
                self._held_bytes -= nbytes
                self._change.notify_all()
