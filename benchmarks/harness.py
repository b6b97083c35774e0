"""Cases, contenders, and how they are timed.

A case prepares its files once. Then its contenders run in turn, round after round, each in a process of its own that
imports what it needs and loads something tiny first (but where the import is what is measured). So the page cache, the
allocator and the imports are the same for all, and what one leaves behind nobody else sees.

A warm case loads three times in its process and lets each model go before the next: the first is reported apart, the
better of the others is what is compared. A virtual machine whose host takes free memory away hands it out again at a
small part of the memory's speed; that is in the first load, the same for every loader, and says nothing about one.

Reported are medians, the range, the median of the rounds' ratios to us, the share of the ceiling where a case measures
one, and the peak of the process's own memory above what it had before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "weightlift"
CEILING = "ceiling: "  # a contender of this prefix is no loader, but what the machine can do at most
ROOT = Path(__file__).resolve().parents[1]

Ready = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """``prepare(folder, scale)`` writes files; each contender's function takes the folder, does what is not to be timed
    (imports, a tiny load) and returns the call that is. ``target`` is what the project demands of itself."""

    name: str
    title: str
    prepare: Callable[[Path, float], None]
    contenders: Mapping[str, Callable[[Path], Ready]]
    target: str = ""
    cold: bool = False
    needs: str = ""  # a device type that the machine must have
    fresh: bool = False  # the whole process counts, from its start

    @property
    def loads(self) -> int:
        """How often a process loads: where cache or imports must be cold, only once."""
        return 1 if self.cold or self.fresh else 3


@dataclass
class Result:
    """What the rounds of one case gave."""

    case: str
    title: str
    target: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, list[int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str) -> list[float]:
        """The contender's time over ours, round by round."""
        return [theirs / ours for theirs, ours in zip(self.seconds[name], self.seconds[OURS])]

    def ceiling(self) -> float | None:
        """Median seconds of what the machine can do at most, where the case measured it."""
        found = [self.median(name) for name in self.seconds if name.startswith(CEILING)]
        return min(found, default=None)


def run_case(case: Case, folder: Path, *, rounds: int, tell: Callable[[str], None]) -> Result:
    """All rounds of one case. A contender that fails once is left out from there on, and named."""
    result = Result(case.name, case.title, case.target)
    for number in range(rounds):
        names = list(case.contenders)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:  # nobody always runs right after the same neighbour
            if name in result.failed:
                continue
            if case.cold:
                drop_caches(folder)
            answer = _child(case, name, folder)
            tell(f"{case.name} {number + 1}/{rounds}: {name}")
            if "error" in answer:
                result.failed[name] = answer["error"]
                result.seconds.pop(name, None)
                continue
            result.seconds.setdefault(name, []).append(min(answer["seconds"][1:] or answer["seconds"]))
            result.first.setdefault(name, []).append(answer["seconds"][0])
            result.peak_bytes.setdefault(name, []).append(answer["peak_bytes"])
    return result


def _child(case: Case, name: str, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.child", case.name, name, str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    whole = time.perf_counter() - start
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": last[0][:300]}
    answer: dict[str, Any] = json.loads(lines[-1])
    if case.fresh:
        answer["seconds"] = [whole]
    return answer


def drop_caches(folder: Path) -> None:
    """Ask the system to forget the files' pages (no privilege is needed for files that are clean)."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class PeakMemory:
    """The most anonymous memory of this process while a block of code runs, above what it had before."""

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self._before = self._peak = own_bytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, own_bytes())

    @property
    def above_start_bytes(self) -> int:
        """The peak, less what there was at the start."""
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._peak = max(self._peak, own_bytes())


def own_bytes() -> int:
    """Resident bytes of this process that belong to no file."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def pages(module: Any) -> Iterator[Any]:
    """Parameters and buffers that lie on the CPU, each once."""
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.numel() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield tensor.detach()


def touch(module: Any) -> None:
    """Read one element of every page, so that what was mapped lazily counts."""
    for tensor in pages(module):
        if tensor.is_contiguous():
            tensor.view(-1)[:: max(1, os.sysconf("SC_PAGE_SIZE") // tensor.element_size())].sum()
        else:
            tensor.sum()
