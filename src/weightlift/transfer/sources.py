"""Where bytes come from: the boundary that tests put faults into, and that other stores can stand behind."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from weightlift.checkpoint.entry import ShardFile
from weightlift.checkpoint.reader import difference
from weightlift.errors import CheckpointChanged, Problem

_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None) if sys.platform == "linux" else None


class Handle(Protocol):
    """An open shard file. Every method may be called from several threads at once, but `close`."""

    def readinto(self, buffer: memoryview, offset: int) -> int:
        """Read at most ``len(buffer)`` bytes from byte ``offset``; 0 at the end of the file. Raises OSError."""
        ...

    def readinto_cached(self, buffer: memoryview, offset: int) -> int:
        """As `readinto`, but only what needs no waiting (the page cache); 0 when nothing is known to be there."""
        ...

    def changed(self) -> Problem | None:
        """What shows that the file is no longer the one that was planned with, if anything does."""
        ...

    def fileno(self) -> int:
        """A descriptor to map; it stays the handle's own."""
        ...

    def close(self) -> None:
        """Give back what is open."""
        ...


class Source(Protocol):
    """Opens shard files. Safe to use from several threads."""

    def check(self, file: ShardFile) -> Problem | None:
        """Look, without opening, whether the file is still the one that was planned with."""
        ...

    def overwritten(self, file: ShardFile) -> Problem | None:
        """Whether the very file that was mapped has since been cut or written to; one that took its name is no harm."""
        ...

    def open(self, file: ShardFile) -> Handle:
        """Open for reading. Raises OSError, or `CheckpointChanged` when another file has taken its place."""
        ...


def _gone(file: ShardFile) -> Problem:
    return Problem("the file is gone", file=file.path, hint="open the checkpoint again")


class FileSource:
    """Files of the local system, read with ``pread`` into the caller's memory."""

    def check(self, file: ShardFile) -> Problem | None:
        """Compare size, modification time, device and inode; a file that is gone counts as changed."""
        try:
            return difference(file, os.stat(file.path))
        except FileNotFoundError:
            return _gone(file)

    def overwritten(self, file: ShardFile) -> Problem | None:
        """Compare as `check` does, if the name still stands for the same file."""
        try:
            now = os.stat(file.path)
        except OSError:
            return None
        return difference(file, now) if (now.st_ino, now.st_dev) == (file.inode, file.device) else None

    def open(self, file: ShardFile) -> FileHandle:
        """Open and compare again, now on the descriptor that is read from."""
        summary = "a checkpoint file changed since it was opened"
        try:
            handle = FileHandle(file)
        except FileNotFoundError:
            raise CheckpointChanged(summary, [_gone(file)]) from None
        problem = handle.changed()
        if problem is not None:
            handle.close()
            raise CheckpointChanged(summary, [problem])
        return handle


class FileHandle:
    """One descriptor. Reads carry their own offset, so that threads share it without a lock (Windows: with one)."""

    def __init__(self, file: ShardFile) -> None:
        self._file = file
        # O_NONBLOCK means nothing to a regular file; should a pipe have taken its place, opening waits for no writer.
        flags = ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK")
        self._fd = os.open(file.path, sum((getattr(os, flag, 0) for flag in flags), os.O_RDONLY))
        self._lock = threading.Lock()
        self._nowait = _NOWAIT

    def readinto(self, buffer: memoryview, offset: int) -> int:
        """See `Handle.readinto`. Python itself repeats a call that a signal interrupted (EINTR)."""
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [buffer], offset)
        if hasattr(os, "pread"):
            data = os.pread(self._fd, len(buffer), offset)
        else:
            with self._lock:
                os.lseek(self._fd, offset, os.SEEK_SET)
                data = os.read(self._fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readinto_cached(self, buffer: memoryview, offset: int) -> int:
        """See `Handle.readinto_cached`; not every file system can tell, and then nothing is known."""
        if self._nowait is None:
            return 0
        try:
            return os.preadv(self._fd, [buffer], offset, self._nowait)
        except BlockingIOError:
            return 0
        except OSError:
            # Not supported here, or a real fault: the ordinary read that follows will tell which.
            self._nowait = None
            return 0

    def changed(self) -> Problem | None:
        """See `Handle.changed`."""
        return difference(self._file, os.fstat(self._fd))

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor; closing twice does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class OpenFiles:
    """The files of one run: opened at the first read, closed after the last, so that few are open at a time."""

    def __init__(self, source: Source, files: Mapping[Path, ShardFile], uses: Iterable[Path]) -> None:
        self._source = source
        self._files = files
        self._lock = threading.Lock()
        self._handles: dict[Path, Handle] = {}
        self._left: dict[Path, int] = {}
        for path in uses:
            self._left[path] = self._left.get(path, 0) + 1

    def get(self, path: Path) -> Handle:
        """The open handle of a file. Raises as `Source.open` does."""
        with self._lock:
            handle = self._handles.get(path)
            if handle is None:
                handle = self._handles[path] = self._source.open(self._files[path])
            return handle

    def done(self, path: Path) -> None:
        """One use is over. Raises `CheckpointChanged` if, after the last, the file is not what it was."""
        with self._lock:
            self._left[path] -= 1
            handle = self._handles.pop(path) if self._left[path] == 0 else None
        if handle is None:
            return
        try:
            problem = handle.changed()
        finally:
            handle.close()
        if problem is not None:
            raise CheckpointChanged("a checkpoint file changed while it was read", [problem])

    def close(self) -> None:
        """Close what is still open, after an error. No thread may be reading any more."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.close()
