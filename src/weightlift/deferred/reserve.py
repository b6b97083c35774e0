"""Address space without memory: buffers that cost nothing until somebody writes to them.

On Linux a reservation is an anonymous private mapping with ``MAP_NORESERVE``: an ordinary, zero-filled address range
whose pages come into being when touched. Reservations share mappings: one each would take longer to make and to undo
than all else about a birth, and tens of thousands of tensors would need more of them than there may be
(``vm.max_map_count`` is 65,530 by default). The pages of a large one go back to the system by themselves, when it dies.
Elsewhere the same buffers come from plain anonymous mappings, one for each that is large.

With ``WEIGHTLIFT_GUARD_RESERVATIONS=1`` in the environment at import, reservations are inaccessible until they are
opened: an access that the recorder did not see is then a segmentation fault instead of a silent zero. The same kind of
mapping is used when the system counts writable reservations against a limit (strict overcommit, ``RLIMIT_DATA``).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable

from weightlift import pages

_GUARD = os.environ.get("WEIGHTLIFT_GUARD_RESERVATIONS", "") not in ("", "0")
_PAGE = mmap.PAGESIZE
_ALIGN = 64
_LARGE_BYTES = 1 << 20
_FIRST_BLOCK_BYTES = 16 << 20
_FIRST_LARGE_BLOCK_BYTES = 64 << 20
_MAX_BLOCK_BYTES = 64 << 30

_FLAGS = pages.MAP_PRIVATE | pages.MAP_ANONYMOUS | pages.MAP_NORESERVE


class Block:
    """One mapping. Its memory goes back to the system when the last view of it is gone; ``piecewise``: that of each
    reservation in it by itself (`open_range`)."""

    __slots__ = ("address", "piecewise", "sealed", "size_bytes", "view")

    def __init__(self, size_bytes: int, *, piecewise: bool = False) -> None:
        self.size_bytes = size_bytes
        self.piecewise = piecewise
        self.sealed = False
        self.address = 0
        self.view = memoryview(self._map(size_bytes))

    def _map(self, size_bytes: int) -> mmap.mmap | ctypes.Array[ctypes.c_char]:
        if not _GUARD or not pages.AVAILABLE:
            try:
                return _map_plainly(size_bytes)
            except (OSError, ValueError, OverflowError):
                if not pages.AVAILABLE:
                    raise MemoryError(f"the system refuses {size_bytes:,} bytes of memory") from None
        try:
            self.address = pages.map_pages(size_bytes, access=pages.NO_ACCESS, flags=_FLAGS)
        except OSError:
            raise MemoryError(
                f"the system refuses to reserve {size_bytes:,} bytes of address space (RLIMIT_AS?)"
            ) from None
        self.sealed = True
        return pages.owned(self.address, size_bytes)


def _map_plainly(size_bytes: int) -> mmap.mmap:
    """Zero-filled memory that takes up room when it is touched, and on Linux is not counted before."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size_bytes)
    return mmap.mmap(-1, size_bytes, flags=_FLAGS if pages.AVAILABLE else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Reservations:
    """Hands out reserved buffers. One object a construction; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._small = _Arena(_ALIGN)
        self._large = _LargeArena(_PAGE)

    def reserve(self, nbytes: int) -> tuple[memoryview, Block, int]:
        """A zero-filled buffer of ``nbytes`` (> 0), the block it lies in and its offset there."""
        with self._lock:
            return (self._small if nbytes < _LARGE_BYTES else self._large).cut(nbytes)


class _Arena:
    """The blocks that reservations are cut from, one after the other. Growing with what was cut so far keeps their
    number logarithmic."""

    def __init__(self, align: int) -> None:
        self._align = align
        self._block: Block | None = None
        self._offset = 0
        self.cut_bytes = 0

    def cut(self, nbytes: int) -> tuple[memoryview, Block, int]:
        """See `Reservations.reserve`."""
        self.cut_bytes += nbytes
        block, offset = self._block, self._offset
        if block is None or offset + nbytes > block.size_bytes:
            block, offset = self._next(nbytes), 0
        end = offset + nbytes
        self._offset = end + -end % (_PAGE if block.sealed else self._align)
        return block.view[offset:end], block, offset

    def _next(self, nbytes: int) -> Block:
        wanted = max(nbytes, min(self.wanted_bytes(), _MAX_BLOCK_BYTES))
        try:
            self._block = self.block(_round_up(wanted, _PAGE))
        except MemoryError:
            self._block = self.block(_round_up(nbytes, _PAGE))
        return self._block

    def wanted_bytes(self) -> int:
        """The size of the next block, if that is enough."""
        return max(_FIRST_BLOCK_BYTES, self.cut_bytes)

    def block(self, size_bytes: int) -> Block:
        """A new one."""
        return Block(size_bytes)


class _LargeArena(_Arena):
    """What is left of a block here is so large that it counts where address space does."""

    def wanted_bytes(self) -> int:
        """See `_Arena`. Pages can only go back one by one on Linux."""
        if sys.platform != "linux":
            return 0
        return max(_FIRST_LARGE_BLOCK_BYTES, self.cut_bytes // 4) if pages.space_is_free() else self.cut_bytes // 64

    def block(self, size_bytes: int) -> Block:
        """See `_Arena`."""
        return Block(size_bytes, piecewise=True)


def open_range(
    buffer: memoryview, block: Block, offset: int, in_use: Callable[[], bool] | None = None
) -> None:
    """Make a reservation accessible, before anybody writes there. Once for each. ``in_use``: whether the memory is to
    stay when the buffer dies (None: it is not); who says so cuts it anew (`cut_again`)."""
    unseal(block, offset, buffer.nbytes)
    if block.piecewise:
        weakref.finalize(buffer, _leave, block, offset, buffer.nbytes, in_use).atexit = False


def cut_again(block: Block, offset: int, nbytes: int) -> memoryview:
    """Another buffer in the place of one that has died while it was in use, with what was written there."""
    buffer = block.view[offset : offset + nbytes]
    if block.piecewise:
        weakref.finalize(buffer, _leave, block, offset, nbytes).atexit = False
    return buffer


def _leave(block: Block, offset: int, nbytes: int, in_use: Callable[[], bool] | None = None) -> None:
    if in_use is None or not in_use():
        # To the end of its last page, which is nobody else's.
        give_back(block, offset, _round_up(nbytes, _PAGE))


def unseal(block: Block, offset: int, nbytes: int) -> None:
    """Make a reserved range accessible. Does nothing where it already is."""
    if not block.sealed:
        return
    start = (block.address + offset) // _PAGE * _PAGE
    size = _round_up(block.address + offset + nbytes - start, _PAGE)
    try:
        pages.protect(start, size, pages.READ_WRITE)
    except OSError as error:
        raise MemoryError(f"no memory for {nbytes:,} bytes of weights: {error.strerror}") from error


def give_back(block: Block, offset: int, nbytes: int) -> None:
    """Drop the whole pages of a range, which read as zeros afterwards. Only Linux can; elsewhere nothing happens."""
    if not pages.AVAILABLE:
        return
    start, end = _round_up(offset, _PAGE), (offset + nbytes) // _PAGE * _PAGE
    if offset + nbytes == block.size_bytes:
        end = block.size_bytes
    if start >= end:
        return
    mapping = block.view.obj
    if isinstance(mapping, mmap.mmap):
        mapping.madvise(mmap.MADV_DONTNEED, start, end - start)
    else:
        pages.advise(block.address + start, end - start, mmap.MADV_DONTNEED)


def _round_up(value: int, unit: int) -> int:
    return (value + unit - 1) // unit * unit
