"""Progress in bytes: a callable or one tqdm bar, told from one thread, with values that only grow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from weightlift.options import ProgressOption

_BAR_FROM_BYTES = 256 << 20
_STEP_SECONDS = 0.05


class Reporter:
    """Throttles to steps of 1% or 50 ms; `finish` always reports ``total``. Used from one thread only."""

    def __init__(self, progress: ProgressOption, total_bytes: int) -> None:
        self._total = total_bytes
        self._last = -1
        self._next_time = 0.0
        self._bar: Any = None
        self._tell: Callable[[int, int], None] | None = None
        if progress is None:
            progress = total_bytes >= _BAR_FROM_BYTES and sys.stderr is not None and sys.stderr.isatty()
        if callable(progress):
            self._tell = progress
        elif progress:
            self._bar = bar(total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="loading weights")
            self._tell = self._update_bar

    @property
    def active(self) -> bool:
        """Whether anybody listens."""
        return self._tell is not None

    def update(self, done_bytes: int) -> None:
        """Say how far it is, unless that was said a moment ago. Raises what the callable raises."""
        if self._tell is None or done_bytes <= self._last:
            return
        now = time.monotonic()
        if now < self._next_time and (done_bytes - max(self._last, 0)) * 100 < self._total:
            return
        self._next_time = now + _STEP_SECONDS
        self._report(done_bytes)

    def finish(self) -> None:
        """The last report, if it was not made yet."""
        if self._last != self._total:
            self._report(self._total)

    def close(self) -> None:
        """Leave the terminal in order; called on every way out."""
        if self._bar is not None:
            self._bar.close()

    def _report(self, done_bytes: int) -> None:
        self._last = done_bytes
        if self._tell is not None:
            self._tell(done_bytes, self._total)

    def _update_bar(self, done_bytes: int, total_bytes: int) -> None:
        self._bar.update(done_bytes - self._bar.n)


def bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar, of the kind for where it is shown."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        # tqdm would start a monitor thread for the life of the process.
        monitor_interval = 0

    return Bar(items, **options)
