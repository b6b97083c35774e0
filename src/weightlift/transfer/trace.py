"""What a load did and when: spans, one list a load, made only where somebody asked for them.

A `Trace` is written to by all workers at once: appending to a list is atomic, with and without an interpreter lock,
and nothing is read until the load is over. Times are seconds since the trace began (``time.perf_counter``). Large
weights come in thousands of blocks, each with two spans, so what happens at one is no more than a tuple; the rest is
done when the trace is written.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

_clock = time.perf_counter
_thread = threading.get_ident


class Span(NamedTuple):
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
        self._zero = _clock()
        self._added: list[tuple[str, str, int, float, float, int]] = []  # by threads' numbers, in the clock's seconds
        self._workers: dict[int, str] = {}
        self.samples: list[Sample] = []
        self.choices: dict[str, Any] = {}
        self._next_sample = 0.0
        self.sample()

    def now(self) -> float:
        """Seconds since the trace began."""
        return _clock() - self._zero

    def add(self, kind: str, name: str, start_s: float, nbytes: int = 0) -> None:
        """A span of this thread that ends now."""
        self._add(kind, name, start_s + self._zero, nbytes)

    def _add(self, kind: str, name: str, start: float, nbytes: int) -> None:
        worker = _thread()
        self._added.append((kind, name, worker, start, _clock(), nbytes))
        if worker not in self._workers:
            self._workers[worker] = threading.current_thread().name

    @property
    def spans(self) -> list[Span]:
        """Those that have ended, in the order in which they did."""
        zero, workers = self._zero, self._workers
        return [
            Span(kind, name, workers[worker], start - zero, end - zero, nbytes)
            for kind, name, worker, start, end, nbytes in self._added
        ]

    def sample(self, *, every_s: float = 0.0) -> None:
        """Look at the memory, at most once in ``every_s`` seconds."""
        now = self.now()
        if now < self._next_sample:
            return
        self._next_sample = now + every_s
        found = _memory()
        if found is not None:
            self.samples.append(Sample(now, *found))

    def span(self, kind: str, name: str, nbytes: int = 0) -> AbstractContextManager[None]:
        """Time a block of code, also one that raises."""
        return _Timed(self, kind, name, nbytes)

    def chrome_events(self) -> dict[str, Any]:
        """The Chrome trace-event format ("X" and "C", microseconds), as Perfetto and chrome://tracing read it."""
        spans = self.spans
        workers = {name: number for number, name in enumerate(dict.fromkeys(span.worker for span in spans))}
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
            for span in spans
        ]  # fmt: skip
        events += [
            {
                "ph": "C", "name": "memory", "pid": process, "ts": sample.at_s * 1e6,
                "args": {"own": sample.own_bytes, "files": sample.resident_bytes - sample.own_bytes},
            }
            for sample in self.samples
        ]  # fmt: skip
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": self.choices}


class _Timed(AbstractContextManager[None]):
    __slots__ = ("_kind", "_name", "_nbytes", "_start", "_trace")

    def __init__(self, trace: Trace, kind: str, name: str, nbytes: int) -> None:
        self._trace = trace
        self._kind = kind
        self._name = name
        self._nbytes = nbytes

    def __enter__(self) -> None:
        self._start = _clock()

    def __exit__(self, *_: object) -> None:
        self._trace._add(self._kind, self._name, self._start, self._nbytes)


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
