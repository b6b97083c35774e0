"""Opening files: only regular ones, with the identity they had, and every OS error as a `CheckpointError`.

Nothing is kept open: descriptors live as long as one ``with`` block. Safe to use from any thread.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightlift.checkpoint.entry import Format, ShardFile
from weightlift.checkpoint.sniff import HEAD_BYTES, Sniffed, sniff
from weightlift.errors import CheckpointError, CheckpointNotFound, Problem


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.FileIO, os.stat_result]]:
    """Open a regular file for unbuffered reading; yields it with its status.

    Raises `CheckpointNotFound` when there is no such file, `CheckpointError` for a folder, a device, a pipe, and for
    what the operating system refuses.
    """
    with os_errors(path):
        # Asked before opening: opening a device or a pipe may block or have effects.
        _require_regular(path, os.stat(path))
        with open(path, "rb", buffering=0, opener=_nonblocking) as stream:
            status = os.fstat(stream.fileno())
            _require_regular(path, status)
            yield stream, status


def _nonblocking(path: str, flags: int) -> int:
    # O_NONBLOCK means nothing to a regular file; should the path have become a pipe meanwhile, opening doesn't hang.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _require_regular(path: Path, status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    names = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    found = next((name for test, name in names if test(mode)), "a device")
    raise CheckpointError(
        "cannot read the checkpoint",
        [Problem("is not a regular file", file=path, expected="a regular file", found=found)],
    )


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn the OSErrors of the block into errors of the checkpoint that name ``path``."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFound("no checkpoint", [Problem("no such file", file=path)]) from error
    except OSError as error:
        problem = Problem(f"cannot be read: {error.strerror or error}", file=path)
        raise CheckpointError("cannot read the checkpoint", [problem]) from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, as far as can be told: a link may lead round in a circle, or to where one may not look."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def read_exactly(stream: io.RawIOBase, path: Path, start: int, count: int) -> bytes:
    """``count`` bytes at offset ``start``; a `CheckpointError` with file and range when the file ends before.

    ``count`` must have been checked against the size of the file: it is allocated.
    """
    stream.seek(start)
    parts: list[bytes] = []
    missing = count
    while missing:
        part = stream.read(missing)
        if not part:
            raise short_read(path, start, start + count, count - missing)
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def short_read(path: Path, start: int, end: int, got: int, key: str | None = None) -> CheckpointError:
    """The error for a file that ended within the range ``start:end`` after ``got`` bytes."""
    problem = Problem(
        "the file ends too early",
        key=key,
        file=path,
        start=start,
        end=end,
        expected=f"{end - start} bytes",
        found=f"{got} bytes",
        hint="it was cut while or before being read",
    )
    return CheckpointError("cannot read the checkpoint", [problem])


def shard_file(path: Path, kind: Format, status: os.stat_result) -> ShardFile:
    """The record of a file with the identity in ``status``."""
    return ShardFile(
        path=path,
        format=kind,
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        device=status.st_dev,
    )


def sniff_file(path: Path) -> tuple[Sniffed | None, int]:
    """What the file looks like (None: unknown), and its size in bytes."""
    with opened(path) as (stream, status):
        head = read_exactly(stream, path, 0, min(status.st_size, HEAD_BYTES))
    return sniff(head), status.st_size
