"""Filling a parallelised module: each rank reads the byte ranges of its own local shards, and nothing else.

A loaded tensor's boxes become reads into the local shard. A missing one's initialiser runs as in a single process, on
the whole tensor and seeded by its name; the rank keeps its boxes and gives the rest back before the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from weightlift.deferred.replay import Replay, needed, replays
from weightlift.deferred.tape import Record
from weightlift.distributed.kept import hand_over
from weightlift.distributed.layout import Box
from weightlift.distributed.shapes import Home, place
from weightlift.options import LoadOptions
from weightlift.plan.parts import local_parts, part
from weightlift.plan.records import Action, Part, Row
from weightlift.plan.regions import Region, whole
from weightlift.strides import is_row_major
from weightlift.transfer.budget import Budget
from weightlift.transfer.engine import run
from weightlift.transfer.jobs import Job, Task, initialise, one_entry
from weightlift.transfer.memory import new_tensor
from weightlift.transfer.subject import Load, Subject


@dataclass(slots=True)
class Local:
    """One local shard in the making. Names whose place holds the same DTensor share it."""

    home: Home
    device: torch.device
    homes: list[Home] = field(default_factory=list)
    tensor: torch.Tensor | None = None

    @property
    def row(self) -> Row:
        """The row of the first name."""
        return self.home.row

    @property
    def fresh(self) -> bool:
        """Whether a user's DTensor has no memory yet."""
        held: torch.Tensor = self.home.now._local_tensor  # type: ignore[attr-defined]
        return held.is_meta

    def memory(self) -> torch.Tensor:
        """The local shard's tensor: the one that a user's DTensor has already, else a new one."""
        if self.tensor is None:
            held: torch.Tensor = self.home.now._local_tensor  # type: ignore[attr-defined]
            if not held.is_meta:
                self.tensor = held.detach()
            elif self.device.type == "cpu":
                self.tensor = new_tensor(held.shape, self.row.dtype)
            else:
                self.tensor = torch.empty(held.shape, dtype=self.row.dtype, device=self.device)
        return self.tensor

    def boxes(self) -> tuple[Box, ...]:
        """The parts of the whole tensor that this rank holds."""
        assert self.home.layout is not None
        return self.home.layout.boxes()


def locals_of(homes: Iterable[Home], device: Callable[[Home], torch.device]) -> list[Local]:
    """The local shards to fill, in the module's order."""
    found: dict[int, Local] = {}
    for home in homes:
        shard = found.get(id(home.now))
        if shard is None:
            shard = found[id(home.now)] = Local(home, device(home))
        shard.homes.append(home)
    return list(found.values())


def read_locals(
    load: Load,
    shards: list[Local],
    offered: Mapping[int, Row],
    kept: Collection[Record],
    *,
    read: bool = True,
) -> None:
    """Give every local shard its values. ``offered`` are the loaded rows, by target; ``kept`` the tapes of tensors that
    the module goes on using whole. Without ``read`` only what is missing is made.

    Raises as `weightlift.transfer.engine.run`; until the caller assigns them, no place of the module is changed.
    """
    jobs: list[Job] = []
    mapped: list[tuple[Local, int]] = []
    missing: list[Local] = []
    reserved_bytes = 0
    for shard in shards:
        row = offered.get(shard.row.target)
        if row is None:
            missing.append(shard)
        elif read:
            made = _jobs(shard, row)
            if len(made) == 1 and made[0].into is None:
                mapped.append((shard, len(jobs)))
            elif shard.fresh and shard.device.type == "cpu":
                reserved_bytes += shard.memory().nbytes
            jobs += made
    values = run(
        jobs,
        _initialisers(missing, shards, offered, kept, load.subject, load.options),
        source=load.source,
        options=load.options,
        trace=load.trace,
        reserved_bytes=reserved_bytes,
    )
    for shard, index in mapped:
        shard.tensor = values[index]


def _jobs(shard: Local, row: Row) -> list[Job]:
    """The reads of one local shard: one job that makes it where the source has it in one piece, else one a part."""
    boxes = shard.boxes()
    if len(boxes) == 1 and shard.fresh:
        parts = local_parts(row_parts(row), row.shape, start=boxes[0].start, size=boxes[0].sizes)
        if len(parts) == 1 and parts[0].entry.stride is None and is_row_major(parts[0].shape, parts[0].stride):
            entry = replace(parts[0].entry, shape=boxes[0].sizes)
            return [Job(row.fqn, entry, shard.row.dtype, shard.device)]
    return row_jobs(row, boxes, shard.memory(), fresh=shard.fresh)


def row_parts(row: Row) -> tuple[Part, ...]:
    """What makes a loaded row, as parts of its whole tensor."""
    if row.parts:
        return row.parts
    entry = one_entry(row)
    assert entry is not None
    return (part(entry, whole(row.shape)),)


def row_jobs(row: Row, boxes: Sequence[Box], memory: torch.Tensor, *, fresh: bool = True) -> list[Job]:
    """Reads of boxes of a loaded row, each into its place in ``memory``, which is ``fresh`` or somebody's already."""
    parts = row_parts(row)
    jobs = []
    for box in boxes:
        place = part_of(memory, box.at, box.sizes)
        local = Region(box.sizes, tuple(place.stride()), int(place.storage_offset()))
        for piece in local_parts(parts, row.shape, start=box.start, size=box.sizes, local=local):
            into = memory.as_strided(piece.shape, piece.stride, piece.offset)
            jobs.append(Job(row.fqn, piece.entry, memory.dtype, memory.device, into=into, fresh=fresh))
    return jobs


def part_of(tensor: torch.Tensor, at: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """A box of a tensor, as a view."""
    for dim, (start, size) in enumerate(zip(at, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


# -- what the checkpoint lacks ----------------------------------------------------------------------------------------


def _initialisers(
    missing: list[Local],
    shards: list[Local],
    offered: Mapping[int, Row],
    kept: Collection[Record],
    subject: Subject,
    options: LoadOptions,
) -> list[Task]:
    """Work that makes whole tensors, keeps this rank's boxes of them and gives the memory back.

    As much runs at once as the budget holds, or one tensor that is larger.
    """
    budget = Budget(options.memory_budget_bytes)
    waiting: dict[Record, list[Local]] = {}
    tasks = []
    for shard in missing:
        original = shard.home.slot.tensor
        record = subject.record_of(original)
        if original is shard.home.now:
            continue  # a user's DTensor, which keeps what it has
        if record is not None and record.pending:
            waiting.setdefault(record, []).append(shard)
        else:
            tasks.append(Task(shard.row.fqn, shard.memory().nbytes, _keeper(shard, record)))
    supplied = {
        record
        for shard in shards
        for home in shard.homes
        if shard.row.target in offered and (record := subject.record_of(home.slot.tensor)) is not None
    }
    for replay in replays(needed(waiting, supplied)):
        members = [shard for record in replay.records for shard in waiting.get(record, ())]
        names = ", ".join(shard.row.fqn for shard in members[:3]) or "a constructor's tensor"
        done = [record for record in replay.records if record in waiting and record not in kept]
        tasks.append(Task(names, replay.nbytes, _initialiser(replay, names, members, done, options.seed, budget)))
    return tasks


def _initialiser(
    replay: Replay, names: str, members: list[Local], done: list[Record], seed: int, budget: Budget
) -> Callable[[], None]:
    def run() -> None:
        with budget.holding(replay.nbytes), torch.no_grad():
            initialise(replay, names, seed)
            for shard in members:
                _keep(shard)
            for record in done:
                record.discard()

    return run


def _keeper(shard: Local, record: Record | None) -> Callable[[], None]:
    def keep() -> None:
        if record is not None:
            record.memory()
        _keep(shard)

    return keep


def _keep(shard: Local) -> None:
    """Copy this rank's boxes of the whole tensor."""
    original = shard.home.slot.tensor.detach()
    if original.is_meta:
        return  # the audit says what that means
    local = shard.memory()
    for box in shard.boxes():
        part_of(local, box.at, box.sizes).copy_(part_of(original, box.start, box.sizes))


# -- assignment -------------------------------------------------------------------------------------------------------


def assign_locals(shards: Iterable[Local]) -> None:
    """Put the filled local shards where their DTensors are, as new DTensors of the same placements.

    FSDP2 takes them over as it does after ``load_state_dict(assign=True)``. A user's DTensor was filled in place.
    """
    from torch.distributed.tensor import DTensor

    for shard in shards:
        now: Any = shard.home.now
        if not now._local_tensor.is_meta or shard.tensor is None:
            continue
        filled: Any = DTensor(shard.tensor, now._spec, requires_grad=False)  # type: ignore[no-untyped-call]
        if isinstance(now, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=now.requires_grad)
            own = dict(filled.__dict__)  # what torch keeps there of itself
            hand_over(now, filled)
            filled.__dict__.update(own)
        if torch.__future__.get_swap_module_params_on_conversion():
            torch.utils.swap_tensors(now, filled)  # type: ignore[no-untyped-call]
            continue
        for home in shard.homes:
            place(home.slot, filled)


def loaded_rows(rows: Iterable[Row]) -> dict[int, Row]:
    """The row of each target that the checkpoint provides."""
    return {row.target: row for row in rows if row.action is Action.LOADED}
