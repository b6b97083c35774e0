"""``source_rank``: one rank reads, and streams to every other the parts that it keeps.

Each rank says which boxes of which tensors it wants. The source goes through them tensor by tensor, reads a few
messages ahead within its budget, and sends each rank its own; what all ranks want alike goes out as a broadcast. A
receiver holds one message besides what it keeps.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weightlift.distributed.fill import part_of, row_jobs
from weightlift.distributed.layout import Box
from weightlift.distributed.team import Team
from weightlift.errors import LoadCancelled
from weightlift.options import LoadOptions
from weightlift.plan.records import Row
from weightlift.strides import row_major
from weightlift.transfer.chunks import DEFAULT_BUDGET_BYTES, boxes
from weightlift.transfer.engine import run
from weightlift.transfer.jobs import Job
from weightlift.transfer.progress import Reporter
from weightlift.transfer.subject import Bytes

if TYPE_CHECKING:
    from weightlift.distributed.wire import Wire

_LARGEST_MESSAGE_BYTES = 16 << 20
_SMALLEST_MESSAGE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Want:
    """The boxes of one target's value that a rank keeps, in the dtype in which it keeps them."""

    target: int
    dtype: torch.dtype
    boxes: tuple[Box, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all boxes."""
        return sum(box.numel for box in self.boxes) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Message:
    """One box on its way: to one rank, or (None) to all."""

    to: int | None
    target: int
    dtype: torch.dtype
    box: Box


class Stream:
    """The exchange of one load. ``source`` is the source's rank within the team."""

    def __init__(self, team: Team, wire: Wire, source: int, options: LoadOptions) -> None:
        self._team = team
        self._wire = wire
        self._source = source
        self._options = options
        budget = DEFAULT_BUDGET_BYTES if options.memory_budget_bytes is None else options.memory_budget_bytes
        self._budget_bytes = budget // 2
        self._message_bytes = min(max(budget // 8, _SMALLEST_MESSAGE_BYTES), _LARGEST_MESSAGE_BYTES)

    def serve(self, wants: Sequence[Want], offered: Mapping[int, Row], source: Bytes) -> None:
        """On the source: send the other ranks what they want. ``wants`` are its own, which it reads for itself."""
        notes = self._team.collect(self._source, _packed(wants))
        asked = [_unpacked(note) for note in notes]
        common = _common(asked)
        self._team.hand_out(self._source, json.dumps(sorted(common)).encode())
        others = [rank for rank in range(self._team.size) if rank != self._source]
        bundle: list[Message] = []
        held = 0
        for message in self._messages(asked, common, others):
            nbytes = message.box.numel * message.dtype.itemsize
            if bundle and held + nbytes > self._budget_bytes:
                self._send(bundle, offered, source)
                bundle, held = [], 0
            bundle.append(message)
            held += nbytes
        self._send(bundle, offered, source)

    def _messages(self, asked: Sequence[Sequence[Want]], common: set[int], others: Sequence[int]) -> Iterator[Message]:
        """All messages, in the order in which every receiver expects its own."""
        by_target: dict[int, list[tuple[int | None, Want]]] = {}
        for rank in others:
            for want in asked[rank]:
                if want.target in common:
                    by_target.setdefault(want.target, [(None, want)])
                else:
                    by_target.setdefault(want.target, []).append((rank, want))
        for target in sorted(by_target):
            for to, want in by_target[target]:
                for box in self._cut(want):
                    yield Message(to, target, want.dtype, box)

    def _cut(self, want: Want) -> Iterator[Box]:
        """A want's boxes, in messages of bounded size."""
        for box in want.boxes:
            limit = max(self._message_bytes // want.dtype.itemsize, 1)
            for low, sizes in boxes(box.sizes, row_major(box.sizes), limit):
                start = tuple(a + b for a, b in zip(box.start, low, strict=True))
                yield Box(start, tuple(a + b for a, b in zip(box.at, low, strict=True)), sizes)

    def _send(self, bundle: Sequence[Message], offered: Mapping[int, Row], source: Bytes) -> None:
        if not bundle:
            return
        staged: list[torch.Tensor] = []
        jobs: list[Job] = []
        for message in bundle:
            staged.append(torch.empty(message.box.sizes, dtype=message.dtype, device="cpu"))
            flat = Box(message.box.start, (0,) * len(message.box.sizes), message.box.sizes)
            jobs += row_jobs(offered[message.target], [flat], staged[-1])
        run(
            jobs,
            files=source.files,
            tensors=source.tensors,
            copy=True,
            workers=self._options.workers,
            memory_budget_bytes=self._budget_bytes,
            progress=False,
            cancel=self._options.cancel,
        )
        for message, tensor in zip(bundle, staged, strict=True):
            moved = _as_bytes(tensor).to(self._wire.device)
            if message.to is None:
                self._wire.broadcast(moved, self._source)
            else:
                self._wire.send(moved, message.to)

    def receive(self, wants: Sequence[Want], memory: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """On the others: fill ``memory`` (by target, one tensor a want in order) with what the source sends."""
        self._team.collect(self._source, _packed(wants))
        common = set(json.loads(self._team.hand_out(self._source, None)))
        waiting = {target: iter(tensors) for target, tensors in memory.items()}
        done = 0
        reporter = Reporter(self._options.progress, sum(want.nbytes for want in wants))
        try:
            for want in sorted(wants, key=lambda want: want.target):
                tensor = next(waiting[want.target])
                for box in self._cut(want):
                    if self._options.cancel is not None and self._options.cancel.is_set():
                        raise LoadCancelled
                    self._receive_one(part_of(tensor, box.at, box.sizes), want, broadcast=want.target in common)
                    done += box.numel * want.dtype.itemsize
                    reporter.update(done)
            reporter.finish()
        finally:
            reporter.close()

    def _receive_one(self, place: torch.Tensor, want: Want, *, broadcast: bool) -> None:
        direct = place.is_contiguous() and place.device == self._wire.device and place.dtype == want.dtype
        into = place if direct else torch.empty(place.shape, dtype=want.dtype, device=self._wire.device)
        if broadcast:
            self._wire.broadcast(_as_bytes(into), self._source)
        else:
            self._wire.receive(_as_bytes(into), self._source)
        if not direct:
            place.copy_(into)


def _common(asked: Sequence[Sequence[Want]]) -> set[int]:
    """Targets that every rank wants alike, once."""
    first = {want.target: want for want in asked[0]}
    common = {target for target in first if sum(want.target == target for want in asked[0]) == 1}
    for wants in asked[1:]:
        same = {want.target for want in wants if first.get(want.target) == want}
        often = {want.target for want in wants if sum(other.target == want.target for other in wants) > 1}
        common &= same - often
    return common


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, which every backend carries."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _packed(wants: Sequence[Want]) -> bytes:
    rows = [
        [want.target, str(want.dtype).removeprefix("torch."), [[box.start, box.at, box.sizes] for box in want.boxes]]
        for want in wants
    ]
    return zlib.compress(json.dumps(rows).encode(), 1)


def _unpacked(note: bytes) -> list[Want]:
    rows = json.loads(zlib.decompress(note))
    return [
        Want(target, getattr(torch, dtype), tuple(Box(*map(tuple, box)) for box in found))
        for target, dtype, found in rows
    ]
