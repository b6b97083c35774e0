"""From decisions to a module with values: checks, reads, initialisers, then assignment.

Nothing of the module is changed before everything that can fail for want of bytes has been read, except memory that
is filled in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from weightlift.ambient import outside_modes
from weightlift.deferred.inventory import (
    Inventory,
    has_other_users,
    held_by,
    held_elsewhere,
    is_lazy,
    modules_of,
    storage_address,
    users_of,
)
from weightlift.deferred.replay import label_samples, needed, replays
from weightlift.deferred.tape import Record
from weightlift.errors import Problem, TransferError
from weightlift.plan.parts import fault_of
from weightlift.plan.records import Action, Row
from weightlift.strides import has_overlap
from weightlift.transfer import headroom
from weightlift.transfer.adopt import adopt, fill, holds_its_bytes, replaced, wraps_others
from weightlift.transfer.engine import run
from weightlift.transfer.finish import finish
from weightlift.transfer.homes import Member, NewHome, fits, homes, in_its_order
from weightlift.transfer.jobs import Job, Task, entry_in_files, initialise, one_entry
from weightlift.transfer.memory import new_memory
from weightlift.transfer.settle import settle_small
from weightlift.transfer.subject import Load, Subject


def apply(load: Load) -> nn.Module:
    """Carry out a load whose ties `weightlift.transfer.ties` has settled. Raises TransferError, LoadCancelled."""
    decisions, subject, source = load.decisions, load.subject, load.source
    with outside_modes():
        extras = {name: source.extras[name] for name in decisions.extra_state}
        _Application(load).run()
    inventory = subject.inventory
    # A walk that finds nothing to do is left out; what a state-dict hook changed may have hooks of its own.
    hooked = subject.post_hooks and any(module._load_state_dict_post_hooks for module in inventory.modules)
    modules: Iterable[nn.Module] = inventory.modules
    if extras or source.changes or hooked:
        finish(inventory.module, decisions, extras, post_hooks=subject.post_hooks)
        modules = modules_of(inventory.module)  # which that may have replaced
    _audit(subject, modules)
    return inventory.module


class _Order(NamedTuple):
    """What is to be done for one row, by how many jobs. ``into``: the memory that they fill; None: the one job makes
    the value."""

    jobs: int
    into: torch.Tensor | None
    in_place: bool


_NEW = _Order(1, None, False)  # as nearly all are


def _cpu_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")


class _Application:
    """One load, carried out."""

    def __init__(self, load: Load) -> None:
        decisions, subject = load.decisions, load.subject
        self._subject = subject
        self._source = load.source
        self._options = load.options
        self._trace = load.trace
        slots = subject.inventory.slots
        addresses = [storage_address(slot.tensor) for slot in slots]
        users = users_of(slots, addresses)
        rows = {row.fqn: row for row in decisions.rows}
        members = {}
        self._records: dict[Record, None] = {}  # of all slots
        self._watched: set[int] = set()  # storages of the module that somebody else's tensors lie on as well
        self._held = held_elsewhere(slots)  # ids of buffers that somebody else may hold, the very objects
        for slot, address in zip(slots, addresses):
            record = subject.record_at(address)
            if record is not None:
                self._records[record] = None
            if has_other_users(slot.tensor, address, users[address]):
                self._watched.add(address)
            row = rows.get(slot.fqn)
            if row is not None:
                members[slot.fqn] = Member(row, slot, address, record)
        self._members = [members[fqn] for fqn in rows]
        self._tied = _tied(self._members)
        self._shared = {address for address, count in users.items() if count > 1}
        self._homes = homes(item for item in self._members if item.address in self._shared and not self._parts(item))
        self._devices = {name: torch.device(name) for name in {row.device for row in decisions.rows}}

    def run(self) -> None:
        """Read, initialise, assign."""
        loaded, rest = self._split()
        jobs: list[Job] = []
        orders = [self._order(member, jobs) for member in loaded]
        copied = {member.row.fqn for member in loaded if self._known(member) and not self._order_old(member, jobs)}
        supplied = self._supplied(loaded)
        tasks = self._initialisers(supplied)
        filled = self._move_in(loaded)
        made_here = [order.into for order in orders if order.into is not None and not order.in_place]
        try:
            values = run(
                jobs,
                tasks,
                source=self._source,
                options=self._options,
                trace=self._trace,
                reserved_bytes=_cpu_bytes((*made_here, *filled)),
            )
        except BaseException:
            self._tell_autograd(loaded)  # some may have been written
            raise
        began = 0.0 if self._trace is None else self._trace.now()
        for record in supplied:
            record.last = None  # the values are there; what the constructor would have done is history
        for change in self._source.changes:
            change.apply()
        at = 0
        for member, order in zip(loaded, orders, strict=True):
            value = values[at] if order.into is None else order.into
            at += order.jobs
            if member.row.fqn in copied:
                member.slot.tensor.detach().copy_(value)
            place = None if order.in_place else self._place(member)
            if place is not None:
                written = (member.row.fqn for member, order in zip(loaded, orders) if order.in_place)
                fill(place, value, member.row, written)
            self._assign(member, None if order.in_place or place is not None else value)
        for member in rest:
            self._own(member)
        self._tell_autograd(loaded)
        settle_small(self._subject.inventory.slots, self._records)
        if self._trace is not None:
            self._trace.add("assign", "the module", began)

    def _tell_autograd(self, loaded: Iterable[Member]) -> None:
        """What is written below torch is no change to it: a backward of an earlier forward would take new values."""
        if self._subject.existing:
            tied = (self._tied.get(member.row.target, (member,)) for member in loaded)
            torch.autograd.graph.increment_version([member.slot.tensor for members in tied for member in members])

    def _split(self) -> tuple[list[Member], list[Member]]:
        """The rows that are read (one a target), and for every other target one row."""
        loaded: list[Member] = []
        rest: list[Member] = []
        for first in self._members:
            members = self._tied.get(first.row.target)
            if members is None:
                (loaded if first.row.action is Action.LOADED else rest).append(first)
            elif first is members[0]:
                reading = next((member for member in members if member.row.action is Action.LOADED), None)
                if reading is None:
                    rest.append(first)
                else:
                    loaded.append(reading)
        return loaded, rest

    # -- what is read -------------------------------------------------------------------------------------------------

    def _order(self, member: Member, jobs: list[Job]) -> _Order:
        """Add the jobs that give a row its value: one, or one for each of its parts."""
        row = member.row
        entry = one_entry(row)
        device = self._devices[row.device]
        into = self._place(member)
        if into is not None and (_overlaps_itself(into) or not holds_its_bytes(into)):
            into = None
        elif into is not None and entry is None and not into.is_contiguous():
            into = None  # the parts go by places in a row
        in_place = into is not None
        fresh = not in_place or self._home(member) is not None
        if entry is not None:
            into = in_its_order(row, member.slot.tensor) if into is None else into
            jobs.append(Job(row.fqn, entry, row.dtype, device, into, fresh))
            return _NEW if into is None else _Order(1, into, in_place)
        fault = fault_of(row.parts, row.shape)
        assert fault is None, f"the parts of {row.fqn}: {fault}"
        into = new_memory(row.shape, row.dtype, device) if into is None else into
        if (whole := entry_in_files(row)) is not None:
            jobs.append(Job(row.fqn, whole, row.dtype, device, into=into, fresh=fresh, parts=row.parts))
            return _Order(1, into, in_place)
        for part in row.parts:
            region = into.as_strided(part.shape, part.stride, into.storage_offset() + part.offset)
            jobs.append(Job(row.fqn, part.entry, row.dtype, device, into=region, fresh=fresh))
        return _Order(len(row.parts), into, in_place)

    def _parts(self, member: Member) -> bool:
        """Whether a tensor leaves memory that others keep: its tie is given up, or a state-dict hook gave it new."""
        row, slot, address, _ = member
        others = address in self._shared or address in self._watched
        return row.untied or (others and not row.in_place and not slot.tensor.is_meta)

    def _home(self, member: Member) -> NewHome | None:
        return None if not self._homes or self._parts(member) else self._homes.get(member.address)

    def _place(self, member: Member) -> torch.Tensor | None:
        """The memory that a value belongs into; None where the tensor gets new memory."""
        tensor = member.slot.tensor
        home = self._home(member)
        if home is not None:
            return home.view(tensor)
        if not member.row.in_place or not fits(member.row, tensor):
            return None
        if member.record is not None:
            member.record.memory()
        return tensor.detach()

    def _known(self, member: Member) -> bool:
        """Whether others know the memory of a tensor that leaves it to be cast or moved: it is given the value too, as
        ``load_state_dict`` would have done it."""
        row, slot, address, record = member
        if address not in self._watched and id(slot.tensor) not in self._held:
            return False
        if address < 0 or slot.tensor.is_meta or fits(row, slot.tensor) or self._parts(member):
            return False
        if has_overlap(slot.tensor.shape, slot.tensor.stride()):
            return False  # it can't be filled
        return (row.in_place or record is not None) and row.shape == tuple(slot.tensor.shape)

    def _order_old(self, member: Member, jobs: list[Job]) -> bool:
        """Add the job that gives the memory which a tensor leaves its value, read again: a value of the other dtype has
        been rounded. False where the value has to do."""
        row, slot, _, record = member
        if record is not None:
            record.memory()
        entry, old = one_entry(row), slot.tensor.detach()
        if entry is None or not holds_its_bytes(old):
            return False
        jobs.append(Job(row.fqn, entry, old.dtype, old.device, old))
        return True

    def _move_in(self, loaded: Iterable[Member]) -> list[torch.Tensor]:
        """Take over what is not read anyway, and return the memory of the rest. Initialisers of storages that are read
        in part have run by now."""
        if not self._homes:
            return []
        read = {row.fqn: slot.tensor.numel() for row, slot, *_ in loaded}
        filled: list[NewHome] = []
        moving: list[NewHome] = []
        for home in self._homes.values():
            whole = any(read.get(member.row.fqn) == home.flat.numel() for member in home.members)
            (filled if whole else moving).append(home)
        headroom.require(
            0, "storages that are converted", reserved_bytes=_cpu_bytes(home.flat for home in (*filled, *moving))
        )
        for home in moving:
            record = home.members[0].record
            if record is not None:
                record.memory()
            home.take_over()
        return [home.flat for home in filled]

    def _supplied(self, loaded: Iterable[Member]) -> set[Record]:
        """Tapes that need not run: what is read covers their whole storage, or replaces it."""
        return {
            member.record
            for member in loaded
            if member.record is not None
            and member.slot.tensor.nbytes == member.record.nbytes
            and not self._parts(member)
            and not _overlaps_itself(member.slot.tensor)
        }

    def _initialisers(self, supplied: set[Record]) -> list[Task]:
        """The recorded initialisers of what nothing supplies, as work for the same pool as the reads."""
        records = [record for record in self._records if record not in supplied]
        if not records:
            return []
        label_samples(self._records)
        nodes = needed(records, supplied)
        stay = (item.record for item in self._members if item.row.in_place or self._known(item))
        in_place = {record for record in stay if record is not None}
        tasks = []
        for replay in replays(nodes):
            names = [record.label for record in replay.records if record.label]
            name = ", ".join(names[:3]) or "a constructor's tensor"
            task = Task(name, replay.nbytes, partial(initialise, replay, name, self._options.seed))
            if in_place and any(not in_place.isdisjoint(node.touched) for node in replay.nodes):
                task.run()  # what is read goes on top of what this reads, or gives a value to
            else:
                tasks.append(task)
        for record in records:
            record.memory()
        return tasks

    # -- assignment ---------------------------------------------------------------------------------------------------

    def _assign(self, owner: Member, value: torch.Tensor | None) -> None:
        """Give every name of a target its value; None: it was filled in place. ``owner``: the one that it is for."""
        row = owner.row
        members = self._tied.get(row.target, (owner,))
        if len(members) == 1 and value is not None:
            self._put(row, owner, value)
            return
        done: dict[int, torch.Tensor] = {}
        for member in members:
            tensor = member.slot.tensor
            if id(tensor) in done:
                if done[id(tensor)] is not tensor:
                    member.slot.put(done[id(tensor)])
                continue
            new = self._moved(row, member) if value is None else value
            done[id(tensor)] = tensor if new is None else self._put(row, member, new)

    def _moved(self, row: Row, member: Member) -> torch.Tensor | None:
        """A tensor's value with the dtype and on the device of the plan; None when it has them already."""
        home, tensor = self._home(member), member.slot.tensor
        if home is not None:
            return home.view(tensor)
        if fits(row, tensor):
            return None
        return tensor.detach().to(device=torch.device(row.device), dtype=row.dtype)

    def _put(self, row: Row, member: Member, value: torch.Tensor) -> torch.Tensor:
        slot, tensor = member.slot, member.slot.tensor
        held = id(tensor) in self._held and not row.untied
        # An uninitialised one stays the object that it is, as `materialize` has it: who holds it waits for a value.
        if held and not (is_lazy(tensor) or fits(row, tensor) or wraps_others(tensor)):
            return replaced(slot, value)
        return adopt(slot, value, fresh=row.untied)

    def _own(self, member: Member) -> None:
        """A target that nothing was read for: its own value, cast and moved."""
        tensor = member.slot.tensor
        if is_lazy(tensor) or (tensor.is_meta and self._home(member) is None):
            return
        self._assign(member, None)


def _tied(members: Iterable[Member]) -> dict[int, list[Member]]:
    """The members of every target that has more than one name."""
    first: dict[int, Member] = {}
    tied: dict[int, list[Member]] = {}
    for member in members:
        if (before := first.setdefault(member.row.target, member)) is not member:
            tied.setdefault(member.row.target, [before]).append(member)
    return tied


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    return not tensor.is_contiguous() and has_overlap(tensor.shape, tensor.stride())


def _audit(subject: Subject, modules: Iterable[nn.Module]) -> None:
    """Law 4: no tensor of the ``modules`` leaves on ``meta`` or without its values."""
    module, recorder = subject.inventory.module, subject.recorder
    records = [] if recorder is None else list(recorder.records.values())
    pending = {record.key for record in records if record.pending}

    def is_unready(tensor: torch.Tensor) -> bool:
        return tensor.is_meta or (len(pending) > 0 and storage_address(tensor) in pending)

    if not any(map(is_unready, held_by(modules))):
        return
    problems = [
        Problem(
            f"the {slot.kind} was built without a value, and the checkpoint has none",
            fqn=slot.fqn,
            hint="build it outside torch.device('meta'), or add it to the checkpoint",
        )
        for slot in Inventory.of(module).slots
        if is_unready(slot.tensor)
    ]
    raise TransferError("the module is not complete", problems)
