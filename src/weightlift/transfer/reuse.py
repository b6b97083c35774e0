"""Memory on huge pages, and what tensors that are gone leave of it for the next load.

New memory is slow: the system finds and clears every page of it, and in a virtual machine whose host takes free memory
back, the host does as well (0.1–1 GB/s were seen there, beside 20 for memory that a process has). So the memory of a
big tensor that dies stays mapped, and is marked ``MADV_FREE``: from then on it is the system's, which takes it without
asking when anybody needs memory, also within a control group, and it counts as available; a load that comes before
that writes to it as it is.

Never more is kept than was in use at once: whoever gets new memory first lets as much of the kept go. Nothing is kept
where address space or data are limited (``RLIMIT_AS``, ``RLIMIT_DATA``, strict overcommit), nor what a forked child may
share.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import threading
import weakref
from collections import deque

from weightlift.deferred.reserve import space_is_free

HUGE_PAGE_BYTES = 2 << 20
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None) if sys.platform == "linux" else None
_FREE: int | None = getattr(mmap, "MADV_FREE", None) if sys.platform == "linux" else None
_PAGE_BYTES = mmap.PAGESIZE


class _Block:
    """A private mapping with ``size_bytes`` from ``offset``, the beginning of a huge page, on."""

    __slots__ = ("era", "mapping", "offset", "size_bytes")

    def __init__(self, size_bytes: int, era: int) -> None:
        """Raises OSError, ValueError: no more memory or mappings, or a kernel without huge pages."""
        assert _HUGE is not None
        self.mapping = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.offset = -ctypes.addressof(ctypes.c_char.from_buffer(self.mapping)) % HUGE_PAGE_BYTES
        self.size_bytes = size_bytes
        self.era = era
        # Whole huge pages only, so that none is committed in vain.
        self.mapping.madvise(_HUGE, self.offset, size_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)

    def leave_to_system(self) -> bool:
        """The content may be lost from now on. False where the system does not do that, or not for this memory."""
        assert _FREE is not None
        try:
            self.mapping.madvise(_FREE, self.offset, self.size_bytes)
        except OSError:
            return False
        return True


class Kept:
    """The blocks of this process that nobody uses. Safe to use from any threads, and by the collector."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_size: dict[int, list[_Block]] = {}
        # What tensors left since. The collector may come at any moment, also while this thread holds the lock.
        self._left: deque[_Block] = deque()
        self._era = 0

    def take(self, nbytes: int) -> memoryview | None:
        """``nbytes`` (> 0) at the beginning of a huge page, with any content; None where there is no such memory."""
        if _HUGE is None:
            return None
        size = nbytes + -nbytes % _PAGE_BYTES
        with self._lock:
            block = self._fitting(size)
            gone = [] if block is not None else self._let_go(size)
            era = self._era
        del gone  # to unmap takes its time, which others need not wait for
        if block is None:
            block = _mapped(size, era)
        if block is None and self.empty():
            block = _mapped(size, era)
        if block is None:
            return None
        view = memoryview(block.mapping)[block.offset : block.offset + nbytes]
        weakref.finalize(view, self._return, block).atexit = False
        return view

    def empty(self) -> int:
        """Give all of it back to the system; how many bytes that was."""
        with self._lock:
            gone = self._let_go(sys.maxsize)
        return sum(block.size_bytes for block in gone)

    def forked(self, *, child: bool) -> None:
        """What lives now may be shared from now on: a write to it would be a copy, so it is not kept when it dies."""
        self._era += 1
        if child:  # where no other thread is, but one may have held the lock
            self._lock = threading.Lock()
            self._by_size, self._left = {}, deque()

    def _return(self, block: _Block) -> None:
        if block.era == self._era and _FREE is not None and space_is_free() and block.leave_to_system():
            self._left.append(block)

    def _fitting(self, size: int) -> _Block | None:
        while self._left:
            block = self._left.popleft()
            self._by_size.setdefault(block.size_bytes, []).append(block)
        if size not in self._by_size:
            size = min((kept for kept in self._by_size if size < kept <= size + size // 4), default=0)
        return self._pop(size) if size else None

    def _let_go(self, nbytes: int) -> list[_Block]:
        """So many bytes, or all there are."""
        gone: list[_Block] = []
        while nbytes > 0 and (self._left or self._by_size):
            gone.append(self._left.popleft() if self._left else self._pop(next(iter(self._by_size))))
            nbytes -= gone[-1].size_bytes
        return gone

    def _pop(self, size: int) -> _Block:
        blocks = self._by_size[size]
        block = blocks.pop()
        if not blocks:
            del self._by_size[size]
        return block


def _mapped(size: int, era: int) -> _Block | None:
    try:
        return _Block(size, era)
    except (OSError, ValueError):
        return None


_kept = Kept()
take = _kept.take
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        after_in_child=functools.partial(_kept.forked, child=True),
        after_in_parent=functools.partial(_kept.forked, child=False),
    )


def empty_cache() -> int:
    """Give back to the system what loaded tensors that are gone left for the next load.

    Only needed to see a process's memory shrink: the system takes it without asking when anybody needs memory, and
    counts it as available. Safe from any thread.

    Returns:
        How many bytes that was; 0 on other systems than Linux, where nothing is kept.
    """
    return _kept.empty()
