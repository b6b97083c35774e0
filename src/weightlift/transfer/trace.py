"""What a load did and when: spans, one list a load, made only where somebody asked for them.

A `Trace` is written to by all workers at once: appending to a list is atomic, with and without an interpreter lock,
and nothing is read until the load is over. Times are seconds since the trace began (``time.perf_counter``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of work of one thread. ``kind``: open, construct, plan, check, map, read, convert, copy, init,
    hash, assign. ``nbytes`` is what it moved (0 for none)."""

    kind: str
    name: str
    worker: str
    start_s: float
    end_s: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory of the whole process at one moment: resident bytes, those of files included, and its own alone."""

    at_s: float
    resident_bytes: int
    own_bytes: int


class Trace:
    """The record of one load. `add` and `sample` may be called from any thread."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()
        self.spans: list[Span] = []
        self.samples: list[Sample] = []
        self.choices: dict[str, Any] = {}
        self._next_sample = 0.0
        self.sample()

    def now(self) -> float:
        """Seconds since the trace began."""
        return time.perf_counter() - self._zero

    def add(self, kind: str, name: str, start_s: float, nbytes: int = 0) -> None:
        """A span of this thread that ends now."""
        self.spans.append(Span(kind, name, threading.current_thread().name, start_s, self.now(), nbytes))

    def sample(self, *, every_s: float = 0.0) -> None:
        """Look at the memory, at most once in ``every_s`` seconds."""
        now = self.now()
        if now < self._next_sample:
            return
        self._next_sample = now + every_s
        found = _memory()
        if found is not None:
            self.samples.append(Sample(now, *found))

    @contextmanager
    def span(self, kind: str, name: str, nbytes: int = 0) -> Iterator[None]:
        """Time a block of code, also one that raises."""
        start = self.now()
        try:
            yield
        finally:
            self.add(kind, name, start, nbytes)

    def chrome_events(self) -> dict[str, Any]:
        """The Chrome trace-event format ("X" and "C", microseconds), as Perfetto and chrome://tracing read it."""
        workers = {name: number for number, name in enumerate(dict.fromkeys(span.worker for span in self.spans))}
        process = os.getpid()
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": number, "args": {"name": name}}
            for name, number in workers.items()
        ]
        events += [
            {
                "ph": "X", "cat": span.kind, "name": span.name or span.kind,
                "pid": process, "tid": workers[span.worker],
                "ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6, "args": {"bytes": span.nbytes},
            }
            for span in self.spans
        ]  # fmt: skip
        events += [
            {
                "ph": "C", "name": "memory", "pid": process, "ts": sample.at_s * 1e6,
                "args": {"own": sample.own_bytes, "files": sample.resident_bytes - sample.own_bytes},
            }
            for sample in self.samples
        ]  # fmt: skip
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": self.choices}


def timed(trace: Trace | None, kind: str, name: str, nbytes: int = 0) -> AbstractContextManager[None]:
    """`Trace.span`, or nothing without a trace."""
    return nullcontext() if trace is None else trace.span(kind, name, nbytes)


def _memory() -> tuple[int, int] | None:
    """Resident and own (anonymous) bytes of this process; None where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            fields = file.read().split()
    except OSError:
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    return int(fields[1]) * page, (int(fields[1]) - int(fields[2])) * page
