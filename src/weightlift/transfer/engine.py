"""The engine: map, read, convert and copy. One call is one run with its own threads, mappings and staging."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from weightlift import pages, strides
from weightlift.ambient import outside_modes
from weightlift.checkpoint.entry import TensorEntry, nbytes_of
from weightlift.errors import CheckpointChanged, LoadCancelled, Problem, TransferError
from weightlift.forked import settle
from weightlift.options import LoadOptions
from weightlift.transfer import chunks, headroom
from weightlift.transfer.accelerator import Backend, backend_for, same_device
from weightlift.transfer.apart import apart
from weightlift.transfer.execute import Executor, Target, Work
from weightlift.transfer.hashing import Hashing
from weightlift.transfer.jobs import Job, Task
from weightlift.transfer.memory import FileMapping, alias, carrier, in_memory, memory_of, new_memory
from weightlift.transfer.pool import Pool
from weightlift.transfer.progress import Reporter
from weightlift.transfer.requests import requests_of
from weightlift.transfer.sources import FileSource, OpenFiles, Source
from weightlift.transfer.subject import Bytes
from weightlift.transfer.trace import Trace, timed

_ALLOCATED_BYTES = 512  # devices' allocators hand out multiples of it


def run(
    jobs: Sequence[Job],
    tasks: Sequence[Task] = (),
    *,
    source: Bytes,
    options: LoadOptions,
    trace: Trace | None = None,
    reserved_bytes: int = 0,
    store: Source | None = None,
    backend: Callable[[torch.device], Backend] = backend_for,
) -> list[torch.Tensor]:
    """Do all jobs and tasks; return each job's tensor in order (``job.into`` where one was given).

    Of ``options`` those count that say how: the budget bounds what is in flight besides the destinations, progress is
    called from the calling thread. Files with digests are hashed too: while they are read, or before that where
    ``into`` of a job would be written. ``reserved_bytes`` of what the jobs fill are new CPU memory that nobody has
    written to yet: there has to be room for them, too. ``store`` and ``backend`` are the boundaries that tests replace.
    Values never depend on the number of workers; with 1 the calling thread does all the work. No thread outlives the
    call.

    Raises:
        CheckpointChanged: a file is not the one that was planned with; nothing was written.
        CheckpointCorrupt: a file's content is not what its digest says; nothing was written.
        TransferError: reading, copying or a task failed; ``written`` names the jobs whose ``into`` was touched.
        LoadCancelled: ``cancel`` was set; ``written`` likewise.
        KeyboardInterrupt: at once, after the pieces under way.
    """
    settle()
    store = store or FileSource()
    with outside_modes():
        source = replace(source, tensors=apart(jobs, source.tensors))
    hashing = Hashing(store, source.files, source.digests, options.cancel)
    work_bytes = sum(task.nbytes for task in (*tasks, *hashing.tasks))
    reporter = Reporter(options.progress, sum([nbytes_of(job.entry) for job in jobs]) + work_bytes)
    load = _Run(jobs, source, options, reserved_bytes, reporter=reporter, store=store, backend=backend, trace=trace)
    try:
        with outside_modes():
            results = load.execute(tasks, hashing)
        reporter.finish()
    except TransferError as error:
        raise TransferError(error.summary, error.problems, load.written()) from error.__cause__
    except LoadCancelled:
        raise LoadCancelled(written=load.written()) from None
    except CheckpointChanged as error:
        # Before anything was written it is the plan that is stale; afterwards the transfer failed half way.
        if not load.written():
            raise
        raise TransferError(error.summary, error.problems, load.written()) from error
    finally:
        reporter.close()
    return results


class _Run:
    """One call of `run`: decides for every job how it is done, then has the pool do what is not done at once."""

    def __init__(
        self,
        jobs: Sequence[Job],
        source: Bytes,
        options: LoadOptions,
        reserved_bytes: int,
        *,
        reporter: Reporter,
        store: Source,
        backend: Callable[[torch.device], Backend],
        trace: Trace | None,
    ) -> None:
        self._jobs = jobs
        self._files = {file.path: file for file in source.files}
        self._tensors = source.tensors
        self._options = options
        self._reserved_bytes = reserved_bytes
        self._reporter = reporter
        self._cancel = options.cancel
        self._store = store
        self._make_backend = backend
        self._trace = trace
        self._backends: dict[torch.device, Backend] = {}
        self._results: list[torch.Tensor | None] = [None] * len(jobs)
        # A flag a job and not a set: writing one is atomic with and without an interpreter lock.
        self._touched = bytearray(len(jobs))
        self._done_bytes = 0

    def written(self) -> tuple[str, ...]:
        """The jobs whose ``into`` was at least partly written."""
        jobs = self._jobs
        found = (jobs[i] for i, flag in enumerate(self._touched) if flag)
        return tuple(dict.fromkeys(job.fqn for job in found if job.into is not None and not job.fresh))

    def execute(self, tasks: Sequence[Task], hashing: Hashing) -> list[torch.Tensor]:
        """See `run`."""
        self._check_files()
        if self._cancel is not None and self._cancel.is_set():
            raise LoadCancelled
        if any(job.into is not None and not job.fresh for job in self._jobs):
            # What a user holds is written to once the files are known to be right.
            self._transfer([], hashing.tasks)
            hashing.require()
            self._done_bytes += sum(task.nbytes for task in hashing.tasks)
        else:
            tasks = [*tasks, *hashing.tasks]
        mapped, shared, rest = self._sort_out()
        self._require_room(rest)
        with timed(self._trace, "map", f"{len(mapped)} files", sum(map(self._bytes_of, mapped.values()))):
            self._map(mapped)
        self._share(shared)
        self._reporter.update(self._done_bytes)
        self._transfer(rest, tasks)
        hashing.require()
        self._check_mapped(mapped)
        results = [tensor for tensor in self._results if tensor is not None]
        assert len(results) == len(self._jobs)
        return results

    def _require_room(self, rest: list[int]) -> None:
        """Before a byte is read: does what has to be allocated on the CPU fit?"""
        new = [self._jobs[i] for i in rest if self._jobs[i].into is None and self._jobs[i].device.type == "cpu"]
        nbytes = sum(job.entry.numel * job.dtype.itemsize for job in new)
        headroom.require(nbytes, "the module's tensors", reserved_bytes=self._reserved_bytes)

    def _check_files(self) -> None:
        """All files at once and before anything is written, so that a stale plan changes nothing."""
        # By identity first: a path takes longer to hash than all else here, and a file's entries share theirs.
        used = {id(item.entry.file): item.entry.file for job in self._jobs for item in (job.parts or (job,))}
        paths = dict.fromkeys(path for path in used.values() if path is not None)
        problems = [problem for path in paths if (problem := self._store.check(self._files[path])) is not None]
        if problems:
            raise CheckpointChanged("the checkpoint changed since it was opened", problems)

    def _check_mapped(self, mapped: Mapping[Path, list[int]]) -> None:
        """A file cut or written to since it was mapped shows in the result: say so while it can still be refused."""
        problems = [
            problem
            for path, group in mapped.items()
            if group and (problem := self._store.overwritten(self._files[path])) is not None
        ]
        if problems:
            raise CheckpointChanged("a checkpoint file changed while it was mapped", problems)

    def _sort_out(self) -> tuple[dict[Path, list[int]], list[int], list[int]]:
        """Indices of jobs: to map (by file), to share from memory, and to transfer."""
        mapped: dict[Path, list[int]] = {}
        file, of_file = None, list[int]()  # the last one's
        shared: list[int] = []
        rest: list[int] = []
        for index, job in enumerate(self._jobs):
            entry = job.entry
            if 0 in entry.shape:
                self._results[index] = self._destination(job)
            elif job.into is not None or self._options.copy or entry.dtype != job.dtype:
                rest.append(index)
            elif entry.file is None:
                tensor = self._tensors[entry.key]
                (shared if same_device(tensor.device, job.device) else rest).append(index)
            elif job.device.type == "cpu" and _mappable(entry):
                if entry.file is not file:
                    file, of_file = entry.file, mapped.setdefault(entry.file, [])
                of_file.append(index)
            else:
                rest.append(index)
        # Two results on the same bytes would be tied by accident: a write to one would show in the other.
        for path, group in mapped.items():
            again = chunks.overlapping([(self._jobs[i].entry.start, self._jobs[i].entry.end) for i in group])
            rest += (group[i] for i in again)
            mapped[path] = [index for i, index in enumerate(group) if i not in again]
        again = self._shared_twice(shared)
        return mapped, [i for i in shared if i not in again], sorted([*rest, *again])

    def _shared_twice(self, shared: list[int]) -> set[int]:
        storages: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        for index in shared:
            entry = self._jobs[index].entry
            tensor = self._tensors[entry.key]
            if tensor.layout is torch.strided:
                start = tensor.data_ptr() + entry.start
                stride = strides.row_major(entry.shape) if entry.stride is None else entry.stride
                end = start + strides.span_elements(entry.shape, stride) * entry.dtype.itemsize
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((index, (start, end)))
        found: set[int] = set()
        for group in storages.values():
            found.update(group[i][0] for i in chunks.overlapping([interval for _, interval in group]))
        return found

    def _map(self, mapped: dict[Path, list[int]]) -> None:
        """One mapping a file; its tensors cost a few microseconds each, in the calling thread, and touch no page."""
        for path, group in mapped.items():
            if not group:
                continue
            file = self._files[path]
            assert all(self._jobs[index].entry.end <= file.size_bytes for index in group), path
            try:
                handle = self._store.open(file)
                try:
                    mapping = FileMapping(handle.fileno(), file.size_bytes, file.path)
                    problem = handle.changed()
                finally:
                    handle.close()
            except OSError as error:
                limited = error.errno == errno.ENOMEM and pages.AVAILABLE and not pages.space_is_free()
                hint = headroom.HIGHER_LIMIT if limited else "copy=True reads it instead"
                problem = Problem(f"the file cannot be mapped: {error}", file=path, hint=hint)
                raise TransferError("loading failed", [problem]) from error
            if problem is not None:
                raise CheckpointChanged("a checkpoint file changed while it was mapped", [problem])
            for index in group:
                entry = self._jobs[index].entry
                stride, nbytes = entry.stride, nbytes_of(entry)
                elements = (
                    nbytes // entry.dtype.itemsize if stride is None else strides.span_elements(entry.shape, stride)
                )
                self._results[index] = mapping.tensor(entry.dtype, entry.shape, stride, entry.start, elements)
                self._done_bytes += nbytes

    def _bytes_of(self, group: list[int]) -> int:
        return sum(nbytes_of(self._jobs[index].entry) for index in group)

    def _share(self, shared: list[int]) -> None:
        for index in shared:
            entry = self._jobs[index].entry
            value = in_memory(entry, self._tensors)
            # A parameter that is an inference tensor could not be trained.
            self._results[index] = alias(value, value.dtype) if value.is_inference() else value
            self._done_bytes += nbytes_of(entry)

    def _transfer(self, rest: list[int], tasks: Sequence[Task]) -> None:
        if not rest and not tasks:
            return
        self._reserve(rest)
        targets = {index: self._target(index) for index in rest}
        workers = self._options.workers
        total_bytes = sum(nbytes_of(self._jobs[index].entry) for index in rest)
        # Each device has a ring of its own beside the CPU's staging.
        limit = chunks.limits(total_bytes, workers, self._options.memory_budget_bytes // (1 + len(self._backends)))
        requests = [request for index in rest for request in requests_of(index, self._jobs[index], targets[index])]
        pieces = chunks.pieces(requests, limit)
        if self._trace is not None:
            self._trace.choices.update(workers=limit.workers, block_bytes=limit.block_bytes, pieces=len(pieces))
            if self._backends:
                self._trace.choices["upload_bytes"] = limit.upload_bytes
        open_files = OpenFiles(self._store, self._files, [p.file for p in pieces if p.file is not None])
        executor = Executor(
            self._jobs, targets, self._touched, open_files, self._backends, limit, stopped=self._cancel,
            trace=self._trace,
        )  # fmt: skip
        queue: list[Work] = sorted(tasks, key=lambda task: -task.nbytes)
        pool: Pool[Work] = Pool(
            pieces,
            queue,
            executor.execute,
            workers=limit.workers if pieces else workers,
            reporter=self._reporter,
            cancel=self._cancel,
            done_bytes=self._done_bytes,
            trace=self._trace,
        )
        try:
            for device_backend in self._backends.values():
                device_backend.begin()
            pool.run()
        finally:
            # Also after an error: until then the device may still read from staging and write to destinations.
            open_files.close()
            for device_backend in self._backends.values():
                device_backend.synchronize()

    def _reserve(self, rest: list[int]) -> None:
        """Tell devices how much will be asked of them."""
        new: dict[torch.device, int] = {}
        for job in (self._jobs[index] for index in rest):
            if job.into is None and job.device.type != "cpu":
                nbytes = job.entry.numel * job.dtype.itemsize
                new[job.device] = new.get(job.device, 0) + -(-nbytes // _ALLOCATED_BYTES) * _ALLOCATED_BYTES
        for device, nbytes in new.items():
            self._backend(device).reserve(nbytes)

    def _target(self, index: int) -> Target:
        """The job's destination, made now where it is new, and what its copies read and write."""
        job = self._jobs[index]
        result = self._destination(job)
        self._results[index] = result
        entry = job.entry
        plain = job.into is None or _ordinary(job.into)
        same = plain and entry.dtype == job.dtype
        dtype = carrier(entry.dtype) if same else entry.dtype
        written = alias(result, dtype if same else job.dtype) if plain else result.detach()
        in_files = entry.file is not None or job.parts
        memory = None if in_files else alias(in_memory(entry, self._tensors), dtype)
        on_cpu = job.device.type == "cpu"
        bytewise = same and on_cpu and memory is None and written.nbytes and written.is_contiguous()
        view = memory_of(written, 0, written.nbytes) if bytewise else None
        return Target(written, dtype, memory, None if on_cpu else job.device, same, view)

    def _destination(self, job: Job) -> torch.Tensor:
        if job.into is not None:
            assert job.into.shape == job.entry.shape, (job.fqn, job.into.shape, job.entry.shape)
            if job.device.type != "cpu" and 0 not in job.entry.shape:
                self._backend(job.device)
            return job.into
        if job.device.type == "cpu":
            return new_memory(job.entry.shape, job.dtype, job.device, fqn=job.fqn, key=job.entry.key)
        return self._backend(job.device).empty(job.entry.shape, job.dtype)

    def _backend(self, device: torch.device) -> Backend:
        found = self._backends.get(device)
        if found is None:
            found = self._backends[device] = self._make_backend(device)
        return found


def _mappable(entry: TensorEntry) -> bool:
    if entry.start % entry.dtype.itemsize:
        return False
    return entry.stride is None or not strides.has_overlap(entry.shape, entry.stride)


def _ordinary(tensor: torch.Tensor) -> bool:
    """Strided, and its memory holds its values as they are (no lazy conjugate or negative)."""
    return tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()
