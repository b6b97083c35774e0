"""Address space without memory: buffers that cost nothing until somebody writes to them.

On Linux a reservation is an anonymous private mapping with ``MAP_NORESERVE``: an ordinary, zero-filled address range
whose pages come into being when touched. Small reservations share arenas, so that tens of thousands of tensors do not
need as many mappings (``vm.max_map_count`` is 65,530 by default). Elsewhere the same
buffers come from a plain anonymous mapping.

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

from weightlift import pages

_GUARD = os.environ.get("WEIGHTLIFT_GUARD_RESERVATIONS", "") not in ("", "0")
_PAGE = mmap.PAGESIZE
_ALIGN = 64
_OWN_MAPPING_BYTES = 1 << 20
_FIRST_ARENA_BYTES = 16 << 20
_MAX_ARENA_BYTES = 64 << 30
_MAX_OWN_MAPPINGS = 16_384

_FLAGS = pages.MAP_PRIVATE | pages.MAP_ANONYMOUS | pages.MAP_NORESERVE


class Block:
    """One mapping. Its memory goes back to the system when the last view of it is gone."""

    __slots__ = ("address", "sealed", "size_bytes", "view")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.sealed = False
        self.address = 0
        self.view = memoryview(self._map(size_bytes))

    def _map(self, size_bytes: int) -> mmap.mmap | ctypes.Array[ctypes.c_char]:
        if not _GUARD or not pages.AVAILABLE:
            try:
                return _map_plainly(size_bytes)
            except (OSError, ValueError):
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
        self._arena: Block | None = None
        self._offset = 0
        self._reserved_bytes = 0
        self._own_mappings = 0

    def reserve(self, nbytes: int) -> tuple[memoryview, Block, int]:
        """A zero-filled buffer of ``nbytes`` (> 0), the block it lies in and its offset there."""
        with self._lock:
            self._reserved_bytes += nbytes
            arena = self._arena
            if nbytes < _OWN_MAPPING_BYTES or self._own_mappings >= _MAX_OWN_MAPPINGS:
                offset = self._offset
                if arena is None or offset + nbytes > arena.size_bytes:
                    arena, offset = self._new_arena(nbytes), 0
                end = offset + nbytes
                self._offset = end + -end % (_PAGE if arena.sealed else _ALIGN)
                return arena.view[offset:end], arena, offset
            self._own_mappings += 1
        block = Block(_round_up(nbytes, _PAGE))
        return block.view[:nbytes], block, 0

    def _new_arena(self, nbytes: int) -> Block:
        # Growing with what was reserved so far keeps the number of mappings logarithmic.
        wanted = min(max(_FIRST_ARENA_BYTES, self._reserved_bytes), _MAX_ARENA_BYTES)
        try:
            self._arena = Block(_round_up(max(wanted, nbytes), _PAGE))
        except MemoryError:
            self._arena = Block(_round_up(nbytes, _PAGE))
        return self._arena


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
