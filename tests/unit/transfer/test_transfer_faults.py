"""Errors, cancelling and interrupts: told exactly, nothing left running."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from transfer_helpers import CPU, FaultySource, load, same, union_bytes

from weightlift.errors import LoadCancelled, TransferError
from weightlift.transfer.jobs import Job, Task

SRC = Path(__file__).parents[3] / "src"


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_os_error_names_everything(saved, workers, dtype, number):
    entry = saved.entries["large.a"]

    def fault(buffer, offset):
        if entry.start <= offset < entry.end and offset > entry.start + 100_000:
            raise OSError(number, os.strerror(number))

    into = {"large.a": torch.zeros(1500, 1201, dtype=dtype)}
    jobs = [Job("model.large.a", entry, dtype, CPU, into["large.a"])]
    source = FaultySource(fault if dtype == torch.float16 else lambda b, o: fault(b, o + 200_000))
    with pytest.raises(TransferError) as caught:
        load(jobs, files=[saved.shard], workers=workers, source=source, memory_budget_bytes=1 << 20)
    problem = caught.value.problems[0]
    assert (problem.fqn, problem.key, problem.file) == ("model.large.a", "large.a", saved.path)
    assert entry.start <= problem.start < problem.end <= entry.end
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == number
    assert caught.value.written == ("model.large.a",)
    assert source.open_handles == 0


def test_written_names_only_what_was_touched(saved):
    keys = ["large.a", "ints"]
    into = {k: torch.zeros_like(saved.tensors[k]) for k in keys}

    def fault(buffer, offset):
        if offset >= saved.entries["large.b"].start and offset < saved.entries["large.b"].end:
            raise OSError(errno.EIO, "broken")

    jobs = [Job(k, saved.entries[k], saved.tensors[k].dtype, CPU, into.get(k)) for k in ("ints", "large.a", "large.b")]
    with pytest.raises(TransferError) as caught:
        load(jobs, files=[saved.shard], workers=1, copy=True, source=FaultySource(fault))
    for key in keys:
        assert (key in caught.value.written) == bool(into[key].any())
    assert "large.b" not in caught.value.written
    untouched = torch.zeros(1500, 1201)
    job = Job("w", saved.entries["large.a"], torch.float32, CPU, untouched)
    source = FaultySource(lambda b, o: (_ for _ in ()).throw(OSError(errno.EIO, "x")) if False else None)
    source.open = lambda file: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no"))
    with pytest.raises(TransferError) as caught:
        load([job], files=[saved.shard], source=source)
    assert caught.value.written == () and not untouched.any()


@pytest.mark.parametrize("workers", [1, 4])
def test_short_reads_are_continued(saved, workers):
    def read_a_little(buffer, offset):
        return None if len(buffer) < 5000 else os.preadv(fd, [buffer[:4999]], offset)

    fd = os.open(saved.path, os.O_RDONLY)
    try:
        jobs = [j for j in saved.jobs() if j.entry.key != "large.b"]
        values = saved.load(jobs, copy=True, workers=workers, source=FaultySource(read_a_little))
    finally:
        os.close(fd)
    assert all(same(v, saved.tensors[k]) for k, v in values.items())


@pytest.mark.parametrize("workers", [1, 4])
def test_the_end_of_the_file_in_the_middle(saved, workers):
    source = FaultySource(lambda buffer, offset: 0 if offset > 2_000_000 else None)
    with pytest.raises(TransferError, match="ends too early") as caught:
        saved.load(copy=True, workers=workers, source=source)
    problem = caught.value.problems[0]
    assert problem.file == saved.path and "end of the file at byte" in problem.found
    assert source.open_handles == 0


def test_a_file_that_changes_while_it_is_read(saved):
    source = FaultySource(lambda buffer, offset: os.utime(saved.path, ns=(3, 3)))
    into = torch.zeros(1500, 1201)
    job = Job("w", saved.entries["large.a"], torch.float32, CPU, into)
    with pytest.raises(TransferError, match="changed") as caught:
        load([job], files=[saved.shard], source=source)
    assert caught.value.written == ("w",)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_first_error_cancels_the_rest(saved, workers):
    def fault(buffer, offset):
        time.sleep(0.01)
        raise OSError(errno.EIO, "broken")

    source = FaultySource(fault)
    with pytest.raises(TransferError):
        saved.load(copy=True, workers=workers, source=source, memory_budget_bytes=1 << 20)
    assert len(source.reads) <= workers


@pytest.mark.parametrize("workers", [1, 4])
def test_cancel_between_pieces(saved, workers):
    cancel = threading.Event()

    def fault(buffer, offset):
        if offset > 1_000_000:
            cancel.set()

    into = torch.zeros(1500, 1201)
    job = Job("w", saved.entries["large.a"], torch.float32, CPU, into)
    source = FaultySource(fault)
    with pytest.raises(LoadCancelled) as caught:
        load([job, *saved.jobs(torch.float16)], files=[saved.shard], workers=workers, cancel=cancel, source=source,
             memory_budget_bytes=1 << 20)  # fmt: skip
    assert (caught.value.written == ("w",)) == bool(into.any())
    assert source.open_handles == 0
    with pytest.raises(LoadCancelled) as caught:
        saved.load(cancel=cancel)
    assert caught.value.written == ()


@pytest.mark.parametrize("workers", [1, 4])
def test_tasks_run_and_their_errors_are_told(saved, workers):
    order, lock = [], threading.Lock()

    def task(n):
        def body():
            with lock:
                order.append(n)

        return Task(f"t{n}", n, body)

    saved.load(tasks=[task(n) for n in (5, 50, 20)], copy=True, workers=workers)
    assert sorted(order) == [5, 20, 50]
    if workers == 1:
        assert order == [50, 20, 5]

    def fail():
        raise ZeroDivisionError("no")

    with pytest.raises(TransferError) as caught:
        load([], [Task("layer.weight", 4, fail)], workers=workers)
    assert caught.value.problems[0].fqn == "layer.weight"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_impossible_conversion_is_told(saved):
    entry = saved.entries["large.a"]
    with pytest.raises(TransferError) as caught:
        load([Job("w", entry, torch.float4_e2m1fn_x2, CPU)], files=[saved.shard])
    assert caught.value.problems[0].key == "large.a" and "converting" in caught.value.problems[0].what


@pytest.mark.parametrize("budget", [60_000, 500_000, 3_000_000])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_staging_stays_in_the_budget(saved, budget, workers):
    source = FaultySource(lambda b, o: time.sleep(0.0005))
    values = saved.load(saved.jobs(torch.float64), workers=workers, memory_budget_bytes=budget, source=source)
    # Nothing can be read straight into its destination here: all buffers are staging.
    assert 0 < union_bytes(source.buffers) <= budget
    assert all(same(v, saved.tensors[k].double()) for k, v in values.items())


CHILD = """
import sys, threading, time, os, signal
sys.path[:0] = [{src!r}, {tests!r}]
from pathlib import Path
import torch
from transfer_helpers import *
path = Path({path!r})
class S(FaultySource):
    pass
source = S(lambda b, o: time.sleep(0.05))
entries, sh = entries_of(path), shard(path)
jobs = [Job(k, e, torch.float16, CPU) for k, e in entries.items()]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a program started in the background has it ignored
print("ready", flush=True)
start = time.monotonic()
try:
    load(jobs * 20, files=[sh], workers={workers}, source=source, memory_budget_bytes=200_000)
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - start, threading.active_count(), source.open_handles, flush=True)
else:
    print("finished", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("workers", [1, 4])
def test_ctrl_c_stops_at_once(saved, workers):
    code = textwrap.dedent(CHILD).format(
        src=str(SRC), tests=str(Path(__file__).parent), path=str(saved.path), workers=workers
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.5)
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        word, _, threads, handles = child.stdout.readline().split()
        took = time.monotonic() - sent
        child.wait(10)
    assert word == "interrupted" and threads == "1" and handles == "0"
    assert took < 1.0 and child.returncode == 0
