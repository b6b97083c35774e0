"""What one of several loads that run at once for one call may use of the threads and the memory of all."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from weightlift.options import default_workers
from weightlift.transfer.chunks import DEFAULT_BUDGET_BYTES

_LEAST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Share:
    """``workers`` threads, ``memory_budget_bytes`` in flight, and the event that stops all of the loads."""

    workers: int
    memory_budget_bytes: int
    cancel: threading.Event


def shares(sizes_bytes: Sequence[int], cancel: threading.Event) -> list[Share]:
    """One share for each of the loads, by the bytes that it has to read: together they stay within one load's."""
    whole = max(1, sum(sizes_bytes))
    workers = default_workers()
    return [
        Share(
            max(1, round(workers * size / whole)),
            max(_LEAST_BYTES, DEFAULT_BUDGET_BYTES * size // whole),
            cancel,
        )
        for size in sizes_bytes
    ]


_mine: ContextVar[Share | None] = ContextVar("weightlift.share", default=None)


@contextlib.contextmanager
def within(share: Share) -> Iterator[None]:
    """Loads of this context take no more than ``share``."""
    token = _mine.set(share)
    try:
        yield
    finally:
        _mine.reset(token)


def of_this_load() -> dict[str, Any]:
    """Options for `weightlift.options.LoadOptions` by this context's share: none where there is no such share."""
    share = _mine.get()
    if share is None:
        return {}
    return {
        "workers": share.workers,
        "memory_budget_bytes": share.memory_budget_bytes,
        "cancel": share.cancel,
        "progress": False,
    }
