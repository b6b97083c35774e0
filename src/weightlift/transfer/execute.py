"""What a worker does with one piece: read, convert, copy; and how a failure is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weightlift.errors import CheckpointChanged, LoadCancelled, Problem, TransferError
from weightlift.transfer.accelerator import Backend
from weightlift.transfer.chunks import Block, Cut, Direct, Limits, Piece
from weightlift.transfer.convert import copy_serially
from weightlift.transfer.cores import cores
from weightlift.transfer.jobs import Job, Task
from weightlift.transfer.memory import Staging, StagingPool, memory_of
from weightlift.transfer.sources import Handle, OpenFiles
from weightlift.transfer.trace import Trace, timed

Work = Piece | Task
# The interpreter is held while bytes are copied; as long as making tensors of them would hold it.
_SMALL_BYTES = 16 << 10
_ONE = (1,)


@dataclass(frozen=True, slots=True)
class Target:
    """A job made ready: the tensor to write (an alias of the result), the dtype under which the source is read, the
    source if it is in memory, the accelerator if there is one. ``same``: source and destination have the same bits.
    ``view``: the bytes of the tensor, where they may be written as such."""

    tensor: torch.Tensor
    dtype: torch.dtype
    memory: torch.Tensor | None
    device: torch.device | None
    same: bool
    view: memoryview | None = None


class Executor:
    """Does pieces and tasks; `execute` is called from all workers at once."""

    def __init__(
        self,
        jobs: Sequence[Job],
        targets: Mapping[int, Target],
        touched: bytearray,
        files: OpenFiles,
        backends: Mapping[torch.device, Backend],
        limit: Limits,
        *,
        stopped: threading.Event | None,
        trace: Trace | None = None,
    ) -> None:
        self._jobs = jobs
        self._targets = targets
        self._touched = touched
        self._files = files
        self._backends = backends
        self._stopped = stopped
        self._trace = trace
        # One block a worker here and two there leave one of `limits`' three for data not aligned to its element.
        self._staging = StagingPool(limit.block_bytes, limit.workers)
        self._rings = {
            device: StagingPool(limit.upload_bytes, 2 * limit.workers, backend.pinned)
            for device, backend in backends.items()
        }
        self._cores = cores()

    def execute(self, work: Work) -> int:
        """Do one piece or task; the bytes it counts for. Raises `TransferError` with its problems, the cause chained,
        or `LoadCancelled`."""
        try:
            if isinstance(work, Task):
                with timed(self._trace, work.kind, work.fqn, work.nbytes):
                    work.run()
                return work.nbytes
            if isinstance(work, Direct):
                self._direct(work)
            else:
                self._block(work)
            if work.file is not None:
                self._files.done(work.file)
            return work.nbytes
        except (TransferError, CheckpointChanged, LoadCancelled):
            raise
        except Exception as error:
            raise TransferError("loading failed", self._problems(work, error)) from error

    def _direct(self, piece: Direct) -> None:
        handle = self._files.get(piece.file)
        target = self._targets[piece.job].tensor
        view = memory_of(target, piece.at, piece.nbytes)
        self._touched[piece.job] = 1
        with timed(self._trace, "read", self._jobs[piece.job].fqn, piece.nbytes):
            with self._cores:
                done = _read_cached(handle, view, piece.start)
            if done < len(view):
                self._read(handle, view, piece.start, done, piece)

    def _block(self, block: Block) -> None:
        device = self._targets[block.cuts[0].job].device
        if block.file is None:
            with self._cores, timed(self._trace, "copy", self._name(block), block.nbytes):
                self._copy_from_memory(block.cuts[0], device)
            return
        handle = self._files.get(block.file)
        if device is not None:
            self._block_to_device(block, handle, device)
            return
        with self._cores:
            staging = self._staging.take()
            try:
                with timed(self._trace, "read", self._name(block), block.nbytes):
                    for view, start in _places(block, staging):
                        done = _read_cached(handle, view, start)
                        if done < len(view):
                            with self._cores.given_back():
                                self._read(handle, view, start, done, block)
                self._mark(block.cuts)
                with timed(self._trace, "convert", self._name(block), block.nbytes):
                    cuts = self._copied_as_bytes(block.cuts, staging)
                    copy_serially(*self._views(cuts, staging))
            finally:
                self._staging.give(staging)

    def _block_to_device(self, block: Block, handle: Handle, device: torch.device) -> None:
        ring, backend = self._rings[device], self._backends[device]
        staging = ring.take()
        try:
            with timed(self._trace, "read", self._name(block), block.nbytes):
                for view, start in _places(block, staging):
                    self._read(handle, view, start, 0, block)
            self._mark(block.cuts)
            with timed(self._trace, "copy", self._name(block), block.nbytes), backend.stream():
                try:
                    for target, source in zip(*self._views(block.cuts, staging), strict=True):
                        target.copy_(source, non_blocking=True)
                finally:
                    # Also when a copy failed: those before it still read from this block.
                    staging.ready = backend.record()
        finally:
            ring.give(staging)

    def _copy_from_memory(self, cut: Cut, device: torch.device | None) -> None:
        target = self._targets[cut.job]
        memory, tensor = target.memory, target.tensor
        assert memory is not None
        self._mark((cut,))
        start = memory.storage_offset() + cut.at // self._jobs[cut.job].entry.dtype.itemsize
        source = memory.as_strided(cut.sizes, cut.src_stride, start)
        part = tensor.as_strided(cut.sizes, cut.dst_stride, tensor.storage_offset() + cut.dst_offset)
        if device is None and memory.device.type == "cpu":
            copy_serially([part], [source])
        elif device is None:
            part.copy_(source)
        else:
            with self._backends[device].stream():
                part.copy_(source)

    def _copied_as_bytes(self, cuts: Sequence[Cut], staging: Staging) -> list[Cut]:
        """Copy the small ones that lie in a row on both sides, which is cheaper than two tensors for each; the rest."""
        rest: list[Cut] = []
        source, targets = staging.view, self._targets
        for cut in cuts:
            view, nbytes = targets[cut.job].view, cut.nbytes
            if view is None or nbytes > _SMALL_BYTES or not cut.src_stride == cut.dst_stride == _ONE:
                rest.append(cut)
                continue
            low = cut.dst_offset * (nbytes // cut.sizes[0])
            view[low : low + nbytes] = source[cut.at : cut.at + nbytes]
        return rest

    def _views(self, cuts: Sequence[Cut], staging: Staging) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        to: list[torch.Tensor] = []
        of: list[torch.Tensor] = []
        for cut in cuts:
            target = self._targets[cut.job]
            tensor = target.tensor
            to.append(tensor.as_strided(cut.sizes, cut.dst_stride, tensor.storage_offset() + cut.dst_offset))
            of.append(staging.strided(target.dtype, cut.at, cut.sizes, cut.src_stride))
        return to, of

    def _read(self, handle: Handle, view: memoryview, start: int, done: int, piece: Piece) -> None:
        """Fill ``view`` from byte ``done`` on; the file ends before ``start + len(view)``: an error."""
        while done < len(view):
            if self._stopped is not None and self._stopped.is_set():
                raise LoadCancelled
            count = handle.readinto(view[done:], start + done)
            if count <= 0:
                problem = self._problems(piece, None)[0]
                raise TransferError("loading failed", [_ended_at(problem, start + done)])
            done += count

    def _name(self, block: Block) -> str:
        name = self._jobs[block.cuts[0].job].fqn
        return name if len(block.cuts) == 1 else f"{name} and {len(block.cuts) - 1} more"

    def _mark(self, cuts: Sequence[Cut]) -> None:
        for cut in cuts:
            self._touched[cut.job] = 1

    def _problems(self, work: Work, error: Exception | None) -> list[Problem]:
        what = "" if error is None else f"{type(error).__name__}: {error}"
        if isinstance(work, Task):
            failed = "its initialiser" if work.kind == "init" else "hashing it"
            return [Problem(f"{failed} failed: {what}", fqn=work.fqn)]
        index = work.job if isinstance(work, Direct) else work.cuts[0].job
        job = self._jobs[index]
        key = job.entry.key if work.file is None else _key_at(job, work.file, work.start, work.end)
        if isinstance(work, Block) and len(work.cuts) > 1:
            what += f" (and {len(work.cuts) - 1} more tensors that share this read)"
        if work.file is None:
            return [Problem(f"copying failed: {what}", fqn=job.fqn, key=key)]
        verb = "reading" if error is None or isinstance(error, OSError) else "converting"
        return [Problem(f"{verb} failed: {what}", key, job.fqn, work.file, work.start, work.end)]


def _places(block: Block, staging: Staging) -> Iterator[tuple[memoryview, int]]:
    """Where in staging each range of a block goes, and where in the file it begins."""
    at = 0
    for start, end in block.reads:
        yield staging.view[at : at + end - start], start
        at += end - start


def _key_at(job: Job, file: Path, start: int, end: int) -> str:
    """The key of what a job reads from a range of a file."""
    entries = (entry for entry in job.entries if entry.file == file and start < entry.end and entry.start < end)
    return next((entry.key for entry in entries), job.entry.key)


def _read_cached(handle: Handle, view: memoryview, start: int) -> int:
    """As many bytes as the system has at hand; how many that were."""
    done = 0
    while done < len(view):
        count = handle.readinto_cached(view[done:], start + done)
        if count <= 0:
            break
        done += count
    return done


def _ended_at(problem: Problem, position: int) -> Problem:
    return replace(
        problem,
        what="the file ends too early; it was cut while being read",
        expected=f"{(problem.end or 0) - (problem.start or 0):,} bytes",
        found=f"the end of the file at byte {position:,}",
        hint="fetch or copy the file again",
    )
