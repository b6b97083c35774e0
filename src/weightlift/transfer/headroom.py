"""Is there room for what a load is about to allocate? Asked before the first byte is read.

What is known: the process's own limits (``RLIMIT_AS``, ``RLIMIT_DATA``), the limit of its control group, and what the
system says it could give without swapping. Mapped weights need no room of their own. Linux only; elsewhere nothing is
known and nothing is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from weightlift.errors import Problem, TransferError
from weightlift.transfer.reuse import empty_cache

_PROC = Path("/proc/self")
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")
_CGROUP_V2 = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
# Below this nothing is asked: reading the limits costs more than such a load.
_SMALL_BYTES = 64 << 20
_OF_PROCESS = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}

HIGHER_LIMIT = "a higher limit of the process (ulimit -v and -d)"
"""What to give a load for which `_OF_PROCESS` leaves no room."""


def require(new_bytes: int, what: str, *, reserved_bytes: int = 0) -> None:
    """Raise `TransferError` if there is known to be no room.

    ``new_bytes`` have yet to be allocated. ``reserved_bytes`` are, but nothing has been written there: the process's
    own limits count them already, while the group and the system will feel them.
    """
    if new_bytes + reserved_bytes < _SMALL_BYTES or sys.platform != "linux":
        return
    short = _short(new_bytes, reserved_bytes)
    if short is not None and empty_cache():  # a limit that was set since does not know whose that memory is
        short = _short(new_bytes, reserved_bytes)
    if short is not None:
        limit, left, needed = short
        # The process's own limits count what is mapped, too: it may be written to.
        other = HIGHER_LIMIT if limit in _OF_PROCESS else "copy=False, which maps what needs no conversion"
        problem = Problem(
            f"there is not enough memory for {what}",
            expected=f"{needed:,} bytes",
            found=f"{max(left, 0):,} bytes left under {limit}",
            hint=f"a smaller dtype, another device, or {other}",
        )
        raise TransferError("nothing was read", [problem])


def _short(new_bytes: int, reserved_bytes: int) -> tuple[str, int, int] | None:
    """The first limit that is too low, what is left under it, and what is needed."""
    for limit, left, counts_reserved in _limits():
        needed = new_bytes if counts_reserved else new_bytes + reserved_bytes
        if left < needed:
            return limit, left, needed
    return None


def _limits() -> Iterator[tuple[str, int, bool]]:
    """Every limit, how many bytes are left under it, and whether it counts what is reserved as used."""
    for limit, left in _of_process():
        yield limit, left, True
    for limit, left in _of_group():
        yield limit, left, False
    numbers = _numbers(Path("/proc/meminfo"))
    if "MemAvailable" in numbers:
        yield "the system's memory and swap", numbers["MemAvailable"] + numbers.get("SwapFree", 0), False


def _of_process() -> Iterator[tuple[str, int]]:
    import resource

    used = _numbers(_PROC / "status")
    for name, field in _OF_PROCESS.items():
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and field in used:
            yield name, limit - used[field]


def _of_group() -> Iterator[tuple[str, int]]:
    """The control groups that the process is in, from its own up to the root; page cache counts as free."""
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "memory":
            folder, files = _CGROUP_V1, ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif controllers == "":
            folder, files = _CGROUP_V2, ("memory.max", "memory.current")
        else:
            continue
        relative = Path(name.lstrip("/"))
        for part in (relative, *relative.parents):
            yield from _of_folder(folder / part, *files)


def _of_folder(folder: Path, limit_file: str, usage_file: str) -> Iterator[tuple[str, int]]:
    try:
        limit = int((folder / limit_file).read_text())
        usage = int((folder / usage_file).read_text())
    except (OSError, ValueError):  # no such group in this view of the system, or "max"
        return
    if limit < _UNLIMITED:
        stat = _numbers(folder / "memory.stat", unit=1)
        cache = sum(stat.get(name, 0) for name in ("inactive_file", "active_file"))
        yield f"the control group's limit of {limit:,} bytes", limit - usage + cache


def _numbers(path: Path, unit: int = 1024) -> dict[str, int]:
    """The ``name: number`` lines of a file of the system, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = (line.replace(":", " ").split() for line in lines)
    return {found[0]: int(found[1]) * unit for found in words if len(found) > 1 and found[1].isdigit()}
