"""What the machine can do at most with the same bytes: the yardstick beside the peers."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import Ready

_HUGE = 2 << 20
_PIECE = 8 << 20


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _huge(nbytes: int) -> mmap.mmap:
    block = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _pieces(files: list[Path]) -> list[tuple[Path, int, int, int]]:
    """(file, start, length, destination)."""
    found, at = [], 0
    for file in files:
        size = file.stat().st_size
        found += [(file, start, min(_PIECE, size - start), at + start) for start in range(0, size, _PIECE)]
        at += -(-size // _HUGE) * _HUGE
    return found


def _parallel(work: list[tuple[Path, int, int, int]], do: Callable[..., None], threads: int) -> None:
    lock, left = threading.Lock(), iter(work)

    def run() -> None:
        while True:
            with lock:
                item = next(left, None)
            if item is None:
                return
            do(*item)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def parallel_read(folder: Path, *, direct: bool = False, threads: int = 0) -> Ready:
    """Read all files into huge pages, with as many threads as cores (8 for ``direct``, past the page cache)."""
    files = _files(folder)
    work = _pieces(files)
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    handles = {file: os.open(file, flags) for file in files}
    count = threads or (8 if direct else len(os.sched_getaffinity(0)))

    def timed() -> object:
        block = _huge(work[-1][3] + _PIECE + _HUGE)
        view = memoryview(block)

        def read(file: Path, start: int, length: int, at: int) -> None:
            rounded = -(-length // 4096) * 4096 if direct else length
            done = 0
            while done < length:
                got = os.preadv(handles[file], [view[at + done : at + rounded]], start + done)
                if got <= 0:
                    break
                done += got

        _parallel(work, read, count)
        return block

    return timed


def plain_conversion(source: torch.dtype, target: torch.dtype, folder: Path) -> Ready:
    """As many threads as cores convert the mapped files into huge pages: no reading of headers, no module."""
    files = _files(folder)
    maps = {file: _mapped(file) for file in files}
    work = _pieces(files)

    def timed() -> object:
        total = (work[-1][3] + _PIECE) // source.itemsize
        block = _huge(total * target.itemsize)
        result = torch.frombuffer(block, dtype=target, count=total)

        def convert(file: Path, start: int, length: int, at: int) -> None:
            step = 512 << 10  # stays in the core's cache
            for low in range(start, start + length, step):
                high = min(low + step, start + length) // source.itemsize * source.itemsize
                part = maps[file][low:high].view(source)
                begin = (at + low - start) // source.itemsize
                torch._foreach_copy_([result[begin : begin + part.numel()]], [part])

        _parallel(work, convert, len(os.sched_getaffinity(0)))
        return block

    return timed


def _mapped(file: Path) -> torch.Tensor:
    with file.open("rb") as opened:
        return torch.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
