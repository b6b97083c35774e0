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

import functools
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from pathlib import Path

from weightlift import pages

HUGE_PAGE_BYTES = 2 << 20
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None) if pages.AVAILABLE else None
_FREE: int | None = getattr(mmap, "MADV_FREE", None) if pages.AVAILABLE else None
_PAGE_BYTES = mmap.PAGESIZE


class _Block:
    """Private memory from the beginning of a huge page on, unmapped when the object dies."""

    __slots__ = ("__weakref__", "address", "era", "size_bytes")

    def __init__(self, size_bytes: int, living: dict[int, None]) -> None:
        """``living`` has its address for as long. Raises OSError: no more memory, or a kernel without huge pages."""
        assert _HUGE is not None
        self.address = pages.map_aligned(size_bytes, HUGE_PAGE_BYTES)
        self.size_bytes = size_bytes
        self.era = 0
        living[self.address] = None
        # At exit the system takes it back; somebody may read a tensor until then.
        weakref.finalize(self, _unmap, living, self.address, size_bytes).atexit = False
        pages.advise(self.address, size_bytes, _HUGE)

    def leave_to_system(self) -> bool:
        """The content may be lost from now on. False where the system does not do that, or not for this memory."""
        if _FREE is None:
            return False
        try:
            pages.advise(self.address, self.size_bytes, _FREE)
        except OSError:
            return False
        return True


def _unmap(living: dict[int, None], address: int, size_bytes: int) -> None:
    living.pop(address)  # before it may be another's
    pages.unmap(address, size_bytes)


class Kept:
    """The blocks of this process that nobody uses. Safe to use from any threads, by the collector, and by handlers of
    signals: whatever interrupts this thread in here finds nothing kept."""

    def __init__(self, most_blocks: int | None = None) -> None:
        """``most_blocks``: so many may live, in use or kept. Each may be a mapping, of which a process has few
        (``vm.max_map_count``): by default they take half of those."""
        self._most_blocks = _most_mappings() // 2 if most_blocks is None else most_blocks
        self._lock = threading.RLock()
        self._busy = False
        self._by_size: dict[int, list[_Block]] = {}  # no list is empty, wherever an interrupt comes
        # What tensors left since. The collector may come at any moment, also while this thread holds the lock.
        self._left: deque[_Block] = deque()
        # Addresses of all blocks. Written one entry at a time, also by the collector: no lock is needed.
        self._living: dict[int, None] = {}
        self._era = 0

    def take(self, nbytes: int) -> memoryview | None:
        """``nbytes`` (> 0) at the beginning of a huge page, with any content; None where there is no such memory."""
        if _HUGE is None:
            return None
        size = nbytes + -nbytes % _PAGE_BYTES
        block = self._exchange(size) or self._new(size)
        if block is None and self.empty():
            block = self._new(size)
        if block is None:
            return None
        # No child shares what was kept: it gave that back when it began.
        block.era = self._era
        view = pages.view_of(block.address, nbytes)
        weakref.finalize(view, self._return, block).atexit = False
        return view

    def empty(self) -> int:
        """Give all of it back to the system; how many bytes that was."""
        gone: list[_Block] = []
        with self._lock:
            if not self._busy:
                self._busy = True
                try:
                    gone = self._let_go(sys.maxsize)
                finally:
                    self._busy = False
        return sum(block.size_bytes for block in gone)

    def forked(self, *, child: bool) -> None:
        """What lives now may be shared from now on: a write to it would be a copy, so it is not kept when it dies."""
        self._era += 1
        if child:  # where no other thread is, but one may have held the lock
            self._lock, self._busy = threading.RLock(), False
            self._by_size, self._left = {}, deque()

    def _return(self, block: _Block) -> None:
        if block.era == self._era and pages.space_is_free() and block.leave_to_system():
            self._left.append(block)

    def _exchange(self, size: int) -> _Block | None:
        """A kept block of about that size; where there is none, as much of the kept goes as will be new."""
        gone: list[_Block] = []
        with self._lock:
            if self._busy:
                return None
            self._busy = True
            try:
                block = self._fitting(size)
                if block is None:
                    gone = self._let_go(size)
            finally:
                self._busy = False
        del gone  # to unmap takes its time, which others need not wait for
        return block

    def _new(self, size: int) -> _Block | None:
        if len(self._living) >= self._most_blocks:
            return None
        try:
            return _Block(size, self._living)
        except OSError:
            return None

    def _fitting(self, size: int) -> _Block | None:
        while self._left:
            block = self._left.popleft()
            if (blocks := self._by_size.get(block.size_bytes)) is None:
                self._by_size[block.size_bytes] = [block]
            else:
                blocks.append(block)
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
        return self._by_size.pop(size)[0] if len(blocks) == 1 else blocks.pop()


def _most_mappings() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65_530


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
    counts it as available. Safe from any thread, and in a handler of a signal.

    Returns:
        How many bytes that was; 0 in a handler that comes while its thread is in here, and on other systems than
        Linux, where nothing is kept.
    """
    return _kept.empty()
