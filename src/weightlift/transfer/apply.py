"""From decisions to a module with values: checks, reads, initialisers, then assignment.

Nothing of the module is changed before everything that can fail for want of bytes has been read, except memory that
is filled in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from weightlift.ambient import outside_modes
from weightlift.checkpoint.entry import TensorEntry
from weightlift.deferred.inventory import Inventory, Slot, has_other_users, held_by, is_lazy, storage_address
from weightlift.deferred.replay import label_samples, replays
from weightlift.deferred.tape import Record, needed
from weightlift.errors import Problem, TransferError
from weightlift.options import LoadOptions
from weightlift.plan.parts import fault_of
from weightlift.plan.records import Action, Decisions, Row
from weightlift.strides import is_row_major
from weightlift.transfer import headroom
from weightlift.transfer.engine import run
from weightlift.transfer.finish import finish
from weightlift.transfer.homes import Home, fits, homes, new_memory
from weightlift.transfer.jobs import Job, Task
from weightlift.transfer.subject import Bytes, Subject
from weightlift.transfer.trace import Trace


def apply(
    decisions: Decisions, subject: Subject, source: Bytes, options: LoadOptions, trace: Trace | None = None
) -> nn.Module:
    """Carry out decisions that `weightlift.transfer.ties` has settled. Raises TransferError, LoadCancelled."""
    with outside_modes():
        extras = {name: source.extras[name] for name in decisions.extra_state}
        application = _Application(decisions, subject, source, options, trace)
        application.run()
    inventory = subject.inventory
    # A walk that finds nothing to do is left out; what a state-dict hook changed may have hooks of its own.
    if extras or source.changes or any(module._load_state_dict_post_hooks for _, module in inventory.modules):
        finish(inventory.module, decisions, extras)
    application.audit()
    return inventory.module


@dataclass(frozen=True, slots=True)
class _Order:
    """What is to be done for one row. ``into``: the memory that its jobs fill; None: the one job makes the value."""

    jobs: tuple[Job, ...]
    into: torch.Tensor | None
    in_place: bool


def _cpu_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")


class _Application:
    """One execution of a plan."""

    def __init__(
        self,
        decisions: Decisions,
        subject: Subject,
        source: Bytes,
        options: LoadOptions,
        trace: Trace | None,
    ) -> None:
        self._decisions = decisions
        self._subject = subject
        self._source = source
        self._options = options
        self._trace = trace
        slots = {slot.fqn: slot for slot in subject.inventory.slots}
        members = [(row, slots[row.fqn]) for row in decisions.rows]
        self._groups: dict[int, list[tuple[Row, Slot]]] = {}
        for row, slot in members:
            self._groups.setdefault(row.target, []).append((row, slot))
        self._watched = _watched(slots.values())
        self._homes = homes(members)
        self._devices = {name: torch.device(name) for name in {row.device for row in decisions.rows}}

    def run(self) -> None:
        """Read, initialise, assign."""
        loaded, rest = self._split()
        orders = [self._order(row, slot) for row, slot in loaded]
        jobs = [job for order in orders for job in order.jobs]
        supplied = self._supplied(loaded)
        tasks = self._initialisers(rest, supplied)
        filled = self._move_in(loaded)
        made_here = [order.into for order in orders if order.into is not None and not order.in_place]
        values = run(
            jobs,
            tasks,
            reserved_bytes=_cpu_bytes((*made_here, *filled)),
            files=self._source.files,
            tensors=self._source.tensors,
            copy=self._options.copy,
            workers=self._options.workers,
            memory_budget_bytes=self._options.memory_budget_bytes,
            progress=self._options.progress,
            cancel=self._options.cancel,
            trace=self._trace,
            digests=self._source.digests,
        )
        began = 0.0 if self._trace is None else self._trace.now()
        for record in supplied:
            record.last = None  # the values are there; what the constructor would have done is history
        for change in self._source.changes:
            change.apply()
        made = iter(values)
        for (row, slot), order in zip(loaded, orders, strict=True):
            value, *_ = [next(made) for _ in order.jobs]
            value = value if order.into is None else order.into
            place = None if order.in_place else self._place(row, slot)
            if place is not None:
                place.copy_(value)  # its strides can't be filled part by part
            self._assign(row, None if order.in_place or place is not None else value)
        for row, slot in rest:
            self._own(row, slot)
        if self._trace is not None:
            self._trace.add("assign", "the module", began)

    def _split(self) -> tuple[list[tuple[Row, Slot]], list[tuple[Row, Slot]]]:
        """The rows that are read (one a target), and for every other target one row."""
        loaded, rest = [], []
        for members in self._groups.values():
            reading = next((member for member in members if member[0].action is Action.LOADED), None)
            if reading is not None:
                loaded.append(reading)
            else:
                rest.append(members[0])
        return loaded, rest

    # -- what is read -------------------------------------------------------------------------------------------------

    def _order(self, row: Row, slot: Slot) -> _Order:
        """The jobs that give a row its value: one, or one for each of its parts."""
        entry = _one_entry(row)
        device = self._devices[row.device]
        into = self._place(row, slot)
        if into is not None and (into.is_conj() or into.is_neg() or (entry is None and not into.is_contiguous())):
            into = None  # its bytes are not the value's, or not together
        in_place = into is not None
        fresh = not in_place or self._home(row, slot.tensor) is not None
        if entry is not None:
            return _Order((Job(row.fqn, entry, row.dtype, device, into=into, fresh=fresh),), into, in_place=in_place)
        fault = fault_of(row.parts, row.shape)
        assert fault is None, f"the parts of {row.fqn}: {fault}"
        into = new_memory(row.shape, row.dtype, device) if into is None else into
        if (whole := _in_files(row)) is not None:
            job = Job(row.fqn, whole, row.dtype, device, into=into, fresh=fresh, parts=row.parts)
            return _Order((job,), into, in_place=in_place)
        jobs = []
        for part in row.parts:
            region = into.as_strided(part.shape, part.stride, into.storage_offset() + part.offset)
            jobs.append(Job(row.fqn, part.entry, row.dtype, device, into=region, fresh=fresh))
        return _Order(tuple(jobs), into, in_place=in_place)

    def _home(self, row: Row, tensor: torch.Tensor) -> Home | None:
        if not self._homes or row.untied or is_lazy(tensor):
            return None
        return self._homes.get(storage_address(tensor))

    def _place(self, row: Row, slot: Slot) -> torch.Tensor | None:
        """The memory that a value belongs into; None where the tensor gets new memory."""
        tensor = slot.tensor
        home = self._home(row, tensor)
        if home is not None:
            return home.view(tensor)
        if not row.in_place or not fits(row, tensor):
            return None
        record = self._subject.record_of(tensor)
        if record is not None:
            record.memory()
        return tensor.detach()

    def _move_in(self, loaded: Iterable[tuple[Row, Slot]]) -> list[torch.Tensor]:
        """Take over what is not read anyway, and return the memory of the rest. Initialisers of storages that are read
        in part have run by now."""
        read = {row.fqn: slot.tensor.numel() for row, slot in loaded}
        filled: list[Home] = []
        moving: list[Home] = []
        for home in self._homes.values():
            whole = any(read.get(row.fqn) == home.flat.numel() for row, _ in home.members)
            (filled if whole else moving).append(home)
        headroom.require(
            0, "storages that are converted", reserved_bytes=_cpu_bytes(home.flat for home in (*filled, *moving))
        )
        for home in moving:
            record = self._subject.record_of(home.members[0][1].tensor)
            if record is not None:
                record.memory()
            home.take_over()
        return [home.flat for home in filled]

    def _supplied(self, loaded: Iterable[tuple[Row, Slot]]) -> set[Record]:
        """Tapes that need not run: what is read covers their whole storage, or replaces it."""
        supplied = set()
        for row, slot in loaded:
            if row.untied or is_lazy(slot.tensor):
                continue
            record = self._subject.record_of(slot.tensor)
            if record is not None and slot.tensor.nbytes == record.nbytes:
                supplied.add(record)
        return supplied

    def _initialisers(self, rest: Iterable[tuple[Row, Slot]], supplied: set[Record]) -> list[Task]:
        """The recorded initialisers of what nothing supplies, as work for the same pool as the reads."""
        recorder = self._subject.recorder
        if recorder is None:
            return []
        records: dict[Record, None] = {}
        for slot in self._subject.inventory.slots:
            record = None if is_lazy(slot.tensor) else recorder.record_of(slot.tensor)
            if record is not None and record not in supplied:
                records[record] = None
        if not records:
            return []
        label_samples(self._subject.records())
        nodes = needed(records, supplied)
        in_part = {row.fqn for row, slot in self._partly_read(supplied)}
        tasks = []
        for replay in replays(nodes):
            names = [record.label for record in replay.records if record.label]
            task = Task(", ".join(names[:3]) or "a constructor's tensor", replay.nbytes, _runner(replay, self._options))
            if in_part and in_part.intersection(names):
                task.run()  # what is read goes on top of it
            else:
                tasks.append(task)
        for record in records:
            record.memory()
        return tasks

    def _partly_read(self, supplied: set[Record]) -> list[tuple[Row, Slot]]:
        return [
            (row, slot)
            for members in self._groups.values()
            for row, slot in members
            if row.in_place and (record := self._subject.record_of(slot.tensor)) is not None and record not in supplied
        ]

    # -- assignment ---------------------------------------------------------------------------------------------------

    def _assign(self, row: Row, value: torch.Tensor | None) -> None:
        """Give every name of a target its value; None: it was filled in place."""
        members = self._groups[row.target]
        if len(members) == 1 and value is not None:
            self._put(row, members[0][1], value)
            return
        done: dict[int, torch.Tensor] = {}
        for _, slot in members:
            tensor = slot.tensor
            if id(tensor) in done:
                if done[id(tensor)] is not tensor:
                    slot.put(done[id(tensor)])
                continue
            new = self._moved(row, tensor) if value is None else value
            done[id(tensor)] = tensor if new is None else self._put(row, slot, new)

    def _moved(self, row: Row, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor's value with the dtype and on the device of the plan; None when it has them already."""
        home = self._home(row, tensor)
        if home is not None:
            return home.view(tensor)
        if fits(row, tensor):
            return None
        return tensor.detach().to(device=torch.device(row.device), dtype=row.dtype)

    def _put(self, row: Row, slot: Slot, value: torch.Tensor) -> torch.Tensor:
        if self._watched and not row.untied and not is_lazy(slot.tensor):
            record = self._subject.record_of(slot.tensor)
            if record is not None and storage_address(slot.tensor) in self._watched:
                # Somebody outside the module holds a view of the old memory: it must not be left without its values.
                record.memory()
                slot.tensor.detach().copy_(value)
        return _adopt(slot, value, fresh=row.untied)

    def _own(self, row: Row, slot: Slot) -> None:
        """A target that nothing was read for: its own value, cast and moved."""
        if is_lazy(slot.tensor) or (slot.tensor.is_meta and self._home(row, slot.tensor) is None):
            return
        self._assign(row, None)

    def audit(self) -> None:
        """Law 4: no tensor leaves on ``meta`` or without its values."""
        module = self._subject.inventory.module
        if not any(map(self._is_unready, held_by(module))):
            return
        problems = [
            Problem(
                f"the {slot.kind} was built without a value, and the checkpoint has none",
                fqn=slot.fqn,
                hint="build it outside torch.device('meta'), or add it to the checkpoint",
            )
            for slot in Inventory.of(module).slots
            if self._is_unready(slot.tensor)
        ]
        raise TransferError("the module is not complete", problems)

    def _is_unready(self, tensor: torch.Tensor) -> bool:
        if tensor.is_meta:
            return True
        record = None if is_lazy(tensor) else self._subject.record_of(tensor)
        return record is not None and record.pending


def _in_files(row: Row) -> TensorEntry | None:
    """What the parts of a row make up, if all lie in files under one dtype."""
    dtype = row.parts[0].entry.dtype
    if any(part.entry.file is None or part.entry.dtype != dtype for part in row.parts) or 0 in row.shape:
        return None
    key = row.parts[0].key if row.offer is None else row.offer.key
    return TensorEntry(key, row.shape, dtype, None, 0, prod(row.shape) * dtype.itemsize)


def _one_entry(row: Row) -> TensorEntry | None:
    """What is read for a row whose value is one tensor of the checkpoint as it lies there, in any shape."""
    if row.parts:
        (entry, *more), part = row.entries, row.parts[0]
        if more or entry.stride is not None or not is_row_major(part.shape, part.stride) or part.offset:
            return None
    else:
        assert row.offer is not None
        entry = row.offer.entry
    if entry.shape == row.shape:
        return entry
    return replace(entry, shape=row.shape, stride=None)  # also a one-element vector for a scalar


def _watched(slots: Iterable[Slot]) -> set[int]:
    """Storages of the module that somebody else's tensors lie on as well."""
    seen: set[int] = set()
    holders: dict[int, int] = {}
    first: dict[int, torch.Tensor] = {}
    for slot in slots:
        if id(slot.tensor) not in seen:
            seen.add(id(slot.tensor))
            address = storage_address(slot.tensor)
            holders[address] = holders.get(address, 0) + 1
            first.setdefault(address, slot.tensor)
    return {address for address, count in holders.items() if has_other_users(first[address], address, count)}


def _runner(replay: Any, options: LoadOptions) -> Callable[[], None]:
    def initialise() -> None:
        with torch.no_grad():
            replay.run(options.seed)

    return initialise


def _adopt(slot: Slot, value: torch.Tensor, *, fresh: bool) -> torch.Tensor:
    """Put ``value`` into the tensor object of a slot, so that ties, hooks and references survive.

    A new object takes its place only where torch can't re-point the old one (from ``meta``, an uninitialised one), or
    where a tie is given up.
    """
    tensor = slot.tensor
    if not fresh and not is_lazy(tensor) and not tensor.is_meta:
        tensor.data = value
        return tensor
    if is_lazy(tensor):
        tensor.materialize(tuple(value.shape), device=value.device, dtype=value.dtype)  # type: ignore[attr-defined]
        tensor.data = value
        return tensor
    new: torch.Tensor = value
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(value, requires_grad=tensor.requires_grad)
        new.__dict__.update(tensor.__dict__)
    slot.put(new)
    return new
