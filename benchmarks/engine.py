"""The engine against safetensors and against a plain two-thread conversion, alternating, on one generated file.

    python benchmarks/engine.py [--gib 1.0] [--rounds 5] [--workers 8]

Every case ends ready to use: a mapped tensor has every page read once. Reports medians, the spread, and the least
processor time of any round, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from safetensors.torch import load_file, save_file

from weightlift.checkpoint.entry import ShardFile, TensorEntry
from weightlift.options import LoadOptions
from weightlift.transfer.engine import run
from weightlift.transfer.jobs import Job
from weightlift.transfer.subject import Bytes

_HUGE = 2 << 20
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
CPU = torch.device("cpu")


def make(path: Path, dtype: torch.dtype, nbytes: int) -> None:
    """A file of layers like a language model's: matrices of 32 MiB and norms of a few KiB."""
    elements = (32 << 20) // dtype.itemsize
    tensors = {f"layers.{i}.weight": torch.randn(elements).to(dtype).view(4096, -1) for i in range(nbytes >> 25)}
    tensors |= {f"layers.{i}.norm": torch.randn(4096).to(dtype) for i in range(nbytes >> 25)}
    save_file(tensors, path)


def entries(path: Path) -> tuple[ShardFile, list[TensorEntry]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    stat = path.stat()
    shard = ShardFile(path, "safetensors", stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev)
    base = 8 + length
    found = [
        TensorEntry(key, tuple(h["shape"]), _DTYPES[h["dtype"]], path, *(base + x for x in h["data_offsets"]))
        for key, h in header.items()
    ]
    return shard, found


def ours(path: Path, dtype: torch.dtype, workers: int, copy: bool = False) -> list[torch.Tensor]:
    shard, found = entries(path)
    jobs = [Job(e.key, e, dtype, CPU) for e in found]
    options = LoadOptions(copy=copy, workers=workers, progress=False)
    return run(jobs, source=Bytes((shard,), {}, {}), options=options)


def theirs(path: Path, dtype: torch.dtype, copy: bool = False) -> list[torch.Tensor]:
    return [t.to(dtype, copy=copy) for t in load_file(path).values()]


def huge(nbytes: int) -> torch.Tensor:
    block = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    offset = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % _HUGE
    return torch.frombuffer(block, dtype=torch.uint8, count=nbytes, offset=offset)


def plain(path: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two threads, each half of the tensors, from the mapped file into huge pages: the ceiling."""
    _, found = entries(path)
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    out = []
    for e in found:
        flat = torch.frombuffer(data, dtype=e.dtype, count=e.numel, offset=e.start)
        new = e.numel * dtype.itemsize
        to = huge(new).view(dtype) if new >= 4 << 20 else torch.empty(e.numel, dtype=dtype)
        out.append((flat, to, e.shape))

    def work(part: int) -> None:
        for flat, to, _ in out[part::2]:
            # In pieces that ATen does not split over threads of its own: two threads in all, as the name says.
            torch._foreach_copy_(list(to.split(32704)), list(flat.split(32704)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [to.view(shape) for _, to, shape in out]


def plain_read(path: Path) -> list[torch.Tensor]:
    """Two threads read halves of the file into huge pages: the ceiling of ``copy=True``."""
    size = path.stat().st_size
    to = huge(size)
    fd = os.open(path, os.O_RDONLY)
    view = memoryview(to.numpy())

    def work(start: int, end: int) -> None:
        while start < end:
            start += os.preadv(fd, [view[start : min(end, start + (16 << 20))]], start)

    half = size // 2 // _HUGE * _HUGE
    threads = [threading.Thread(target=work, args=a) for a in ((0, half), (half, size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    return [to]


def touch(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def measure(cases: dict[str, Callable[[], list[torch.Tensor]]], rounds: int, ready: bool) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in cases}
    busy: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            start, cpu = time.perf_counter(), time.process_time()
            result = case()
            if ready:
                touch(result)
            times[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - cpu)
            del result
    for name, seconds in times.items():
        ms, cpu = [1e3 * x for x in seconds[1:]], 1e3 * min(busy[name][1:])
        print(f"    {name:28} {statistics.median(ms):8.1f} ms   {min(ms):7.1f} … {max(ms):7.1f}   cpu {cpu:7.1f}")
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def small(folder: Path, count: int, workers: int, rounds: int) -> None:
    path = folder / "small.safetensors"
    save_file({f"t.{i}": torch.randn(64).to(torch.bfloat16) for i in range(count)}, path)
    shard, found = entries(path)
    for name, dtype, copy in (
        ("map", torch.bfloat16, False),
        ("read", torch.bfloat16, True),
        ("cast", torch.float32, False),
    ):
        jobs = [Job(e.key, e, dtype, CPU) for e in found]
        source, options = Bytes((shard,), {}, {}), LoadOptions(copy=copy, workers=workers, progress=False)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            out = run(jobs, source=source, options=options)
            times.append(time.perf_counter() - start)
            del out
        print(f"    {count} small tensors, {name:5}      {statistics.median(times) / count * 1e6:8.2f} µs a tensor")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="weightlift-engine-"))
    try:
        for name, src, dst in (
            ("bf16→fp32", torch.bfloat16, torch.float32),
            ("fp32→bf16", torch.float32, torch.bfloat16),
        ):
            path = folder / "model.safetensors"
            make(path, src, int(args.gib * (1 << 30)))
            print(f"{name}, {path.stat().st_size / (1 << 30):.2f} GiB, workers={args.workers}")
            result = measure(
                {
                    "weightlift": lambda p=path, d=dst: ours(p, d, args.workers),
                    "safetensors + .to": lambda p=path, d=dst: theirs(p, d),
                    "plain, two threads": lambda p=path, d=dst: plain(p, d),
                },
                args.rounds,
                ready=False,
            )
            a, b, c = result.values()
            print(f"    → {b / a:.2f}× safetensors, {c / a:.0%} of the plain conversion")
        print("same dtype, every page touched")
        a, b = measure(
            {"weightlift map": lambda: ours(path, src, args.workers), "safetensors": lambda: theirs(path, src)},
            args.rounds, ready=True,
        ).values()  # fmt: skip
        print(f"    → {b / a:.2f}× safetensors")
        print("map alone")
        measure(
            {"weightlift map": lambda: ours(path, src, args.workers), "safetensors": lambda: theirs(path, src)},
            args.rounds, ready=False,
        )  # fmt: skip
        print("copy=True")
        a, b, c = measure(
            {
                "weightlift copy": lambda: ours(path, src, args.workers, copy=True),
                "safetensors + clone": lambda: theirs(path, src, copy=True),
                "plain read, two threads": lambda: plain_read(path),
            },
            args.rounds, ready=False,
        ).values()  # fmt: skip
        print(f"    → {b / a:.2f}× safetensors, {c / a:.0%} of the plain read")
        print("many small tensors")
        small(folder, 30_000, args.workers, args.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
