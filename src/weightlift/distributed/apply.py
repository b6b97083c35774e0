"""Carrying out the plan of a parallelised module: checks, local shards, what every rank holds whole, assignment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from weightlift.ambient import outside_modes
from weightlift.checkpoint.entry import TensorEntry
from weightlift.deferred.inventory import is_lazy
from weightlift.deferred.replay import label_samples
from weightlift.deferred.tape import Record
from weightlift.distributed.fill import Local, assign_locals, loaded_rows, locals_of, read_locals
from weightlift.distributed.kept import hand_over
from weightlift.distributed.layout import Box
from weightlift.distributed.shapes import Home, Homes
from weightlift.distributed.stream import Stream, Want
from weightlift.distributed.team import Team
from weightlift.errors import PlanError, Problem
from weightlift.options import LoadOptions
from weightlift.plan.records import Action, Check, Decisions, Offer, Row
from weightlift.transfer.apply import apply
from weightlift.transfer.memory import new_tensor
from weightlift.transfer.subject import Bytes, Load, Subject
from weightlift.transfer.ties import conflicts_of


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who takes part: the team, and with ``source_rank`` the stream and whether it comes from this rank."""

    team: Team
    leader: int
    stream: Stream | None = None

    @property
    def receives(self) -> bool:
        """True on a rank that reads no file."""
        return self.stream is not None and self.team.rank != self.leader


def apply_sharded(load: Load, homes: Homes, ranks: Ranks | None) -> nn.Module:
    """Carry a plan out on this rank. Raises as `weightlift.transfer.apply.apply`, and RanksError."""
    with outside_modes():
        label_samples(load.subject.records())  # by the names of the whole module, as a single process does
        placed = [_placed(home, homes, load.options) for home in homes.homes]
        whole = [home for home in placed if home.layout is None]
        sharded = [home for home in placed if home.layout is not None]
        shards = locals_of(sharded, lambda home: torch.device(home.row.device))
        offered = loaded_rows(load.decisions.rows)
        rest = _whole_rows(offered, whole)
        receives = ranks is not None and ranks.receives
        if ranks is not None and ranks.stream is not None:
            rest, source = _stream(ranks, ranks.stream, shards, rest, offered, load.source)
            options = replace(load.options, progress=False) if receives else load.options
            load = replace(load, source=source, options=options)
        read_locals(load, shards, offered, _records(whole, load.subject), read=not receives)
        assign_locals(shards)
        inventory = replace(homes.inventory, slots=tuple(home.slot for home in whole))
        left = load.of_rows(rest, Subject(inventory, load.subject.recorder))
        apply(replace(left, source=replace(load.source, digests={})))  # by now the files are hashed
        for home in whole:
            if home.left is not None and (tensor := home.slot.now()) is not None:
                hand_over(home.left, tensor)
        return homes.module


def _stream(
    ranks: Ranks,
    stream: Stream,
    shards: Sequence[Local],
    rest: tuple[Row, ...],
    offered: dict[int, Row],
    source: Bytes,
) -> tuple[tuple[Row, ...], Bytes]:
    """Send, or receive: afterwards a receiver's whole tensors are there as tensors in memory."""
    wants = [Want(shard.row.target, shard.row.dtype, shard.boxes()) for shard in shards if shard.row.target in offered]
    loaded = [row for row in rest if row.action is Action.LOADED]
    wants += [Want(row.target, row.dtype, _everything(row.shape)) for row in loaded]
    if not ranks.receives:
        stream.serve(wants, offered, source)
        return rest, source
    memory: dict[int, list[torch.Tensor]] = {}
    for shard in shards:
        if shard.row.target in offered:
            memory.setdefault(shard.row.target, []).append(shard.memory())
    received = {f"{row.fqn} (received)": new_tensor(row.shape, row.dtype) for row in loaded}
    for row in loaded:
        memory.setdefault(row.target, []).append(received[f"{row.fqn} (received)"])
    stream.receive(wants, memory)
    return tuple(_from_memory(row) for row in rest), replace(source, files=(), tensors=received)


def _everything(shape: tuple[int, ...]) -> tuple[Box, ...]:
    return () if 0 in shape else (Box((0,) * len(shape), (0,) * len(shape), shape),)


def _from_memory(row: Row) -> Row:
    if row.action is not Action.LOADED:
        return row
    key = f"{row.fqn} (received)"
    entry = TensorEntry(key, row.shape, row.dtype, None, 0, row.nbytes)
    return row._replace(offer=Offer(row.fqn, key, entry), parts=())


def _whole_rows(offered: dict[int, Row], whole: list[Home]) -> tuple[Row, ...]:
    """The rows of what is whole. A tied one whose provider is sharded is read for itself."""
    present = {home.row.target for home in whole if home.row.action is Action.LOADED}
    rows = []
    for home in whole:
        row = home.row
        if row.tied_to is not None and row.target in offered and row.target not in present:
            present.add(row.target)
            owner = offered[row.target]
            row = row._replace(action=owner.action, offer=owner.offer, parts=owner.parts, tied_to=None)
        rows.append(row)
    return tuple(rows)


def _placed(home: Home, homes: Homes, options: LoadOptions) -> Home:
    """Where nothing else was asked for, every tensor goes to the device of the meshes."""
    if homes.device is None or options.device is not None or options.device_map is not None:
        return home
    return replace(home, row=home.row._replace(device=str(homes.device)))


def _records(whole: list[Home], subject: Subject) -> set[Record]:
    found = (subject.record_of(home.slot.tensor) for home in whole if not is_lazy(home.slot.tensor))
    return {record for record in found if record is not None}


def refuse_conflicts(decisions: Decisions, source: Bytes, options: LoadOptions, ranks: Ranks | None) -> None:
    """Tied names with different values can't be untied once they share a DTensor. One rank looks for all."""
    if not decisions.checks:
        return
    if ranks is None:
        names = [check.other_fqn for check in conflicts_of(decisions, source, options)]
    else:
        found = None
        if ranks.team.rank == ranks.leader:
            found = json.dumps([check.other_fqn for check in conflicts_of(decisions, source, options)]).encode()
        names = json.loads(ranks.team.hand_out(ranks.leader, found))
    problems = [_conflict(check) for check in decisions.checks if check.other_fqn in names]
    if problems:
        raise PlanError(f"{decisions.source} does not fit {decisions.module}; nothing was changed", problems)


def _conflict(check: Check) -> Problem:
    return Problem(
        "tied in the module, but the checkpoint has two different values",
        key=check.other.key,
        fqn=check.other_fqn,
        file=check.other.entry.file,
        expected=f"the bytes of {check.offer.key}",
        hint="build the module untied; a tie can't be given up where parallelize spreads it over ranks",
    )
