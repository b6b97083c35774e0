"""The accelerator's path on a fake device that copies late: staging is not used again before its copies are done."""

import contextlib
import threading
from typing import ClassVar

import pytest
import torch
from transfer_helpers import FaultySource, load, same

from weightlift.checkpoint.memory import entry_of
from weightlift.errors import TransferError
from weightlift.transfer.accelerator import TorchBackend
from weightlift.transfer.jobs import Job

DEVICE = torch.device("cuda:0")


class LateCopy(torch.utils._python_dispatch.TorchDispatchMode):
    """Queues every ``copy_`` instead of running it, as a device's stream does."""

    def __init__(self, queue):
        super().__init__()
        self.queue = queue

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.queue.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


class Mark:
    def __init__(self, backend, at):
        self.backend, self.at = backend, at

    def query(self):
        return self.backend.done >= self.at

    def synchronize(self):
        self.backend.waits += not self.query()
        self.backend.drain(self.at)


class FakeBackend:
    def __init__(self, device):
        self.queue, self.done, self.lock = [], 0, threading.Lock()
        self.pinned_bytes, self.waits, self.synchronized = 0, 0, 0
        self.begun, self.reserved_bytes, self.empty_bytes = None, 0, 0

    def reserve(self, nbytes):
        assert not self.reserved_bytes and not self.empty_bytes
        self.reserved_bytes = nbytes

    def empty(self, shape, dtype):
        assert self.begun is None, "memory that was taken after the device was told what comes first"
        self.empty_bytes += torch.Size(shape).numel() * dtype.itemsize
        return torch.empty(tuple(shape), dtype=dtype)

    def begin(self):
        assert self.begun is None and not self.queue
        self.begun = threading.current_thread()

    def pinned(self, nbytes):
        with self.lock:
            self.pinned_bytes += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    @contextlib.contextmanager
    def stream(self):
        with LateCopy(self.queue):
            yield

    def record(self):
        return Mark(self, len(self.queue))

    def drain(self, mark):
        with self.lock, torch.no_grad():
            while self.done < mark:
                target, source = self.queue[self.done]
                target.copy_(source)
                self.done += 1

    def synchronize(self):
        self.synchronized += 1
        self.drain(len(self.queue))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("budget", [None, 300_000])
def test_late_copies_see_their_own_bytes(saved, workers, dtype, budget):
    made = []

    def backend(device):
        assert device == DEVICE
        made.append(FakeBackend(device))
        return made[-1]

    into = torch.zeros(1201, 1500, dtype=torch.float32).t()
    jobs = [Job(k, e, dtype or e.dtype, DEVICE) for k, e in saved.entries.items()]
    jobs += [Job("into", saved.entries["large.a"], torch.float32, DEVICE, into)]
    jobs += [Job(k, e, e.dtype, torch.device("cpu")) for k, e in saved.entries.items()]
    values = load(jobs, files=[saved.shard], workers=workers, memory_budget_bytes=budget, backend=backend)
    for job, value in zip(jobs, values, strict=True):
        assert same(value, saved.tensors[job.entry.key].to(job.dtype)), job.fqn
    (only,) = made
    assert only.synchronized == 1 and only.done == len(only.queue) > 0
    assert only.begun is threading.current_thread()
    assert only.empty_bytes <= only.reserved_bytes <= only.empty_bytes + 512 * len(jobs)
    assert only.pinned_bytes <= (budget or 512 << 20) // 2
    if budget:
        assert only.waits > 0


def test_an_error_still_waits_for_the_device(saved):
    made = []

    def backend(device):
        made.append(FakeBackend(device))
        return made[-1]

    def fault(buffer, offset):
        if offset > 2_000_000:
            raise OSError(5, "broken")

    jobs = [Job(k, e, e.dtype, DEVICE) for k, e in saved.entries.items()]
    with pytest.raises(TransferError):
        load(jobs, files=[saved.shard], source=FaultySource(fault), backend=backend, memory_budget_bytes=1 << 20)
    assert made[0].synchronized == 1 and made[0].done == len(made[0].queue)


def test_from_memory(saved):
    tensor = torch.randn(50, 60).t()
    entry = entry_of("a", tensor)
    (value,) = load([Job("a", entry, torch.float32, DEVICE)], tensors={"a": tensor}, backend=FakeBackend)
    assert same(value, tensor)


def test_staging_that_the_device_is_done_with_is_used_before_more_is_pinned(saved):
    """A device that is always at once done needs no more blocks than there are threads that fill them."""

    class Done(Mark):
        def query(self):
            self.backend.drain(self.at)
            return True

    class Quick(FakeBackend):
        def record(self):
            return Done(self, len(self.queue))

    made = []

    def backend(device):
        made.append(Quick(device))
        return made[-1]

    jobs = [Job(k, e, e.dtype, DEVICE) for k, e in saved.entries.items()]
    load(jobs, files=[saved.shard], backend=backend, workers=1, memory_budget_bytes=6 * (256 << 10))
    assert made[0].waits == 0 and made[0].pinned_bytes == 256 << 10 < len(made[0].queue) * (64 << 10)


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """The sizes of all that is allocated."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.sizes += [list(args[0])] * (func is torch.ops.aten.empty.memory_format)
        return func(*args, **(kwargs or {}))


class Library:
    """What a device's module of torch tells, as `torch.cuda` does."""

    waited: ClassVar[list] = []

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            Library.waited.append(other)

    @staticmethod
    def current_stream(device):
        return "the caller's"

    @staticmethod
    def memory_reserved(device):
        return 1000

    @staticmethod
    def memory_allocated(device):
        return 400


def test_the_devices_memory_is_asked_for_once_and_the_callers_stream_waited_for_late(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: Library)
    backend = TorchBackend(torch.device("cpu"))
    with Counting() as allocated:
        backend.reserve(600)  # as much as the allocator keeps
        assert allocated.sizes == []
        backend.reserve(1800)
        assert allocated.sizes == [[1200]]
        backend.reserve(1 << 62)  # whether there is as much shows when it is used
    assert Library.waited == []
    backend.begin()
    assert Library.waited == ["the caller's"]
