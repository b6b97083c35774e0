"""Memory straight from the system, as Python's ``mmap`` does not offer it: no access, an alignment, no descriptor kept.

Addresses and sizes are whole pages. On other systems than Linux `AVAILABLE` is False and nothing here may be called.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from pathlib import Path

AVAILABLE = sys.platform == "linux"
if AVAILABLE:
    import resource  # now, and not first in a finaliser

NO_ACCESS = 0
READ_WRITE = 3
# Numbers that are Linux's: Python's `mmap` has them on some systems and in some versions.
MAP_PRIVATE = 0x02
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000

_FAILED = ctypes.c_void_p(-1).value
_PyBUF_WRITE = 0x200

if AVAILABLE:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    _libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # A prototype of our own: what `ctypes.pythonapi` hands out is everybody's.
    _view_of = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
        ("PyMemoryView_FromMemory", ctypes.pythonapi)
    )


def _counts_strictly() -> bool:
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False


_STRICT = AVAILABLE and _counts_strictly()


def space_is_free() -> bool:
    """Whether address space that nobody uses is in nobody's way: the system sets no limit on it, nor on data."""
    unlimited = resource.RLIM_INFINITY
    return (
        resource.getrlimit(resource.RLIMIT_AS)[0] == unlimited
        and resource.getrlimit(resource.RLIMIT_DATA)[0] == unlimited
        and not _STRICT
    )


def map_pages(size_bytes: int, *, access: int, flags: int, fd: int = -1) -> int:
    """The address of a new mapping, which lasts until `unmap`. Raises OSError."""
    if size_bytes > sys.maxsize:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    address: int | None = _libc.mmap(None, size_bytes, access, flags, fd, 0)
    if address is None or address == _FAILED:
        raise _error()
    return address


def map_aligned(size_bytes: int, alignment: int) -> int:
    """The address, a multiple of ``alignment``, of new private memory of just that size. Raises OSError.

    What has to be mapped besides to find such an address is given back at once: it would count against the limits of
    the process, and keep mappings apart that the system makes one of.
    """
    slack = alignment - mmap.PAGESIZE
    low = map_pages(size_bytes + slack, access=READ_WRITE, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    head = -low % alignment
    if head:
        unmap(low, head)
    if slack - head:
        unmap(low + head + size_bytes, slack - head)
    return low + head


def unmap(address: int, size_bytes: int) -> None:
    """Give pages back, whatever they are used for."""
    if _libc.munmap(address, size_bytes) != 0:  # it would need one more mapping for what remains (vm.max_map_count)
        _libc.madvise(address, size_bytes, mmap.MADV_DONTNEED)


def advise(address: int, size_bytes: int, advice: int) -> None:
    """``madvise``. Raises OSError."""
    if _libc.madvise(address, size_bytes, advice) != 0:
        raise _error()


def protect(address: int, size_bytes: int, access: int) -> None:
    """``mprotect``. Raises OSError."""
    if _libc.mprotect(address, size_bytes, access) != 0:
        raise _error()


def view_of(address: int, nbytes: int) -> memoryview:
    """The bytes there, writable. The view does not keep them mapped."""
    view: memoryview = _view_of(address, nbytes, _PyBUF_WRITE)
    return view


def owned(address: int, size_bytes: int) -> ctypes.Array[ctypes.c_char]:
    """A mapping as an object with a buffer, unmapped when the last user of the buffer is gone."""
    array = (ctypes.c_char * size_bytes).from_address(address)
    # At exit the system takes the mapping back; somebody may read a tensor until then.
    weakref.finalize(array, unmap, address, size_bytes).atexit = False
    return array


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
