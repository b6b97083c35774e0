"""``source_rank``: one rank reads, and streams to every other the parts that it keeps.

Each rank says which boxes of which tensors it wants. The source goes through them tensor by tensor, reads a few
messages ahead within its budget, and sends each rank its own; what all ranks want alike goes out as a broadcast. A
receiver holds one message besides what it keeps. What the source has read at once is sent in one round
(`weightlift.distributed.rounds`), between which a rank may fail or be cancelled.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from weightlift.distributed.fill import part_of, row_jobs
from weightlift.distributed.layout import Box
from weightlift.distributed.rounds import Rounds
from weightlift.distributed.team import Team
from weightlift.errors import LoadCancelled
from weightlift.options import LoadOptions
from weightlift.plan.records import Row
from weightlift.strides import row_major
from weightlift.transfer.chunks import boxes
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

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.box.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Place:
    """Where one message goes: a part of what this rank keeps. ``common``: it comes as a broadcast."""

    tensor: torch.Tensor
    dtype: torch.dtype
    common: bool

    @property
    def nbytes(self) -> int:
        """The size of the message."""
        return self.tensor.numel() * self.dtype.itemsize

    def direct(self, device: torch.device) -> bool:
        """Whether a message that arrives on ``device`` can be received in place."""
        tensor = self.tensor
        return tensor.is_contiguous() and tensor.device == device and tensor.dtype == self.dtype


class Stream:
    """The exchange of one load. ``source`` is the source's rank within the team."""

    def __init__(self, team: Team, wire: Wire, source: int, options: LoadOptions) -> None:
        self._team = team
        self._wire = wire
        self._source = source
        self._options = options
        budget_bytes = options.memory_budget_bytes
        self._budget_bytes = budget_bytes // 2
        self._reading = replace(options, copy=True, memory_budget_bytes=self._budget_bytes, progress=False)
        self._message_bytes = min(max(budget_bytes // 8, _SMALLEST_MESSAGE_BYTES), _LARGEST_MESSAGE_BYTES)

    def serve(self, wants: Sequence[Want], offered: Mapping[int, Row], source: Bytes) -> None:
        """On the source: send the other ranks what they want. ``wants`` are its own, which it reads for itself."""
        notes = self._team.collect(self._source, _packed(wants))
        asked = [_unpacked(note) for note in notes]
        common = _common(asked)
        self._team.hand_out(self._source, json.dumps(sorted(common)).encode())
        rounds = Rounds(self._team, self._wire)
        bundles = self._bundles(asked, common)
        outbox = torch.empty(0)
        with rounds.keeping():
            outbox = self._buffer()
        while self._serve_round(bundles, offered, source, outbox, rounds):
            pass

    def _serve_round(
        self,
        bundles: Iterator[list[Message]],
        offered: Mapping[int, Row],
        source: Bytes,
        outbox: torch.Tensor,
        rounds: Rounds,
    ) -> bool:
        """Read and send the next messages; False when there are none."""
        bundle: list[Message] = []
        staged: list[torch.Tensor] = []
        with rounds.keeping():
            bundle = next(bundles, [])
            staged = self._read(bundle, offered, source)
        if not rounds.begin(self._counts(bundle)):
            return False
        for message, tensor in zip(bundle, staged, strict=True):
            self._send(message, _as_bytes(tensor), outbox, rounds)
        return True

    def _bundles(self, asked: Sequence[Sequence[Want]], common: set[int]) -> Iterator[list[Message]]:
        """All messages, as many at a time as the source may hold."""
        others = [rank for rank in range(self._team.size) if rank != self._source]
        bundle: list[Message] = []
        held = 0
        for message in self._messages(asked, common, others):
            if bundle and held + message.nbytes > self._budget_bytes:
                yield bundle
                bundle, held = [], 0
            bundle.append(message)
            held += message.nbytes
        if bundle:
            yield bundle

    def _counts(self, bundle: Sequence[Message]) -> list[int]:
        """How many of the messages each rank gets."""
        to = Counter(message.to for message in bundle)
        return [0 if rank == self._source else to[rank] + to[None] for rank in range(self._team.size)]

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

    def _read(self, bundle: Sequence[Message], offered: Mapping[int, Row], source: Bytes) -> list[torch.Tensor]:
        self._refuse_cancelled()
        staged: list[torch.Tensor] = []
        jobs: list[Job] = []
        for message in bundle:
            staged.append(torch.empty(message.box.sizes, dtype=message.dtype, device="cpu"))
            flat = Box(message.box.start, (0,) * len(message.box.sizes), message.box.sizes)
            jobs += row_jobs(offered[message.target], [flat], staged[-1])
        run(jobs, source=source, options=self._reading)
        return staged

    def _send(self, message: Message, data: torch.Tensor, outbox: torch.Tensor, rounds: Rounds) -> None:
        carrier = data
        if self._wire.device.type != "cpu":
            carrier = outbox[: data.numel()]
            with rounds.keeping():
                carrier.copy_(data)
        with rounds.keeping():
            if message.to is None:
                self._wire.broadcast(carrier, self._source)
            else:
                self._wire.send(carrier, message.to)

    def receive(self, wants: Sequence[Want], memory: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """On the others: fill ``memory`` (by target, one tensor a want in order) with what the source sends."""
        reporter = Reporter(self._options.progress, sum(want.nbytes for want in wants))
        try:
            self._team.collect(self._source, _packed(wants))
            common = set(json.loads(self._team.hand_out(self._source, None)))
            self._fill(wants, memory, common, reporter)
            reporter.finish()
        finally:
            reporter.close()

    def _fill(
        self,
        wants: Sequence[Want],
        memory: Mapping[int, Sequence[torch.Tensor]],
        common: set[int],
        reporter: Reporter,
    ) -> None:
        rounds = Rounds(self._team, self._wire)
        inbox, places, done = torch.empty(0), iter(list[Place]()), 0
        with rounds.keeping():
            inbox, places = self._buffer(), iter(self._places(wants, memory, common))
        while True:
            with rounds.keeping():
                self._refuse_cancelled()
            counts = rounds.begin()
            if not counts:
                return
            for _ in range(counts[self._team.rank]):
                place = next(places)
                self._receive(place, inbox, rounds)
                done += place.nbytes
                if not rounds.failed:
                    with rounds.keeping():
                        reporter.update(done)
                        self._refuse_cancelled()

    def _places(
        self, wants: Sequence[Want], memory: Mapping[int, Sequence[torch.Tensor]], common: set[int]
    ) -> list[Place]:
        """Where messages go, in the order in which they come."""
        waiting = {target: iter(tensors) for target, tensors in memory.items()}
        places = []
        for want in sorted(wants, key=lambda want: want.target):
            tensor = next(waiting[want.target])
            alike = want.target in common
            places += [
                Place(part_of(tensor, box.at, box.sizes), want.dtype, alike) for box in self._cut(want)
            ]
        return places

    def _receive(self, place: Place, inbox: torch.Tensor, rounds: Rounds) -> None:
        tensor, direct = place.tensor, place.direct(self._wire.device)
        into = _as_bytes(tensor) if direct else inbox[: place.nbytes]
        with rounds.keeping():
            if place.common:
                self._wire.broadcast(into, self._source)
            else:
                self._wire.receive(into, self._source)
        if not direct:
            with rounds.keeping():
                tensor.copy_(into.view(place.dtype).view(tensor.shape))

    def _buffer(self) -> torch.Tensor:
        """Room for one message where the wire can carry it, had before a round: in one there is no way back."""
        return torch.empty(self._message_bytes, dtype=torch.uint8, device=self._wire.device)

    def _refuse_cancelled(self) -> None:
        if self._options.cancel is not None and self._options.cancel.is_set():
            raise LoadCancelled


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
