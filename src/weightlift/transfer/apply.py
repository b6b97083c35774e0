"""From decisions to a module with values: checks, reads, initialisers, then assignment.

Nothing of the module is changed before everything that can fail for want of bytes has been read, except memory that
is filled in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from weightlift.ambient import outside_modes
from weightlift.checkpoint.entry import ShardFile
from weightlift.deferred.inventory import Inventory, Slot, is_lazy
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.tape import Record, needed, replays
from weightlift.errors import PlanError, Problem, TransferError
from weightlift.options import LoadOptions
from weightlift.plan.records import Action, Check, Decisions, Row
from weightlift.transfer.compare import same_values
from weightlift.transfer.engine import run
from weightlift.transfer.jobs import Job, Task
from weightlift.transfer.trace import Trace, timed

_log = logging.getLogger("weightlift")


@dataclass(frozen=True, slots=True)
class Subject:
    """The module that a plan was made for: its slots, and the tapes it was built with (None for a user's module)."""

    inventory: Inventory
    recorder: Recorder | None

    def record_of(self, tensor: torch.Tensor) -> Record | None:
        """The tape of a tensor, if it has one."""
        return None if self.recorder is None else self.recorder.record_of(tensor)


@dataclass(frozen=True, slots=True)
class Bytes:
    """Where values come from: files, tensors in memory, values of extra state."""

    files: tuple[ShardFile, ...]
    tensors: Mapping[str, torch.Tensor]
    extras: Mapping[str, Any]


def apply(
    decisions: Decisions, subject: Subject, source: Bytes, options: LoadOptions, trace: Trace | None = None
) -> nn.Module:
    """Carry a plan out. Raises PlanError (nothing changed), TransferError, LoadCancelled."""
    with outside_modes():
        with timed(trace, "check", "tied names"):
            rows = _untie(decisions, _conflicts(decisions, source, options), options)
        return _Application(decisions, rows, subject, source, options, trace).run()


def _conflicts(decisions: Decisions, source: Bytes, options: LoadOptions) -> list[Check]:
    """The checks that fail: tied names whose bytes differ."""
    if not decisions.checks:
        return []
    pairs = [(check.offer.entry, check.other.entry) for check in decisions.checks]
    equal = same_values(
        pairs,
        files=source.files,
        tensors=source.tensors,
        workers=options.workers,
        memory_budget_bytes=options.memory_budget_bytes,
        cancel=options.cancel,
    )
    return [check for check, same in zip(decisions.checks, equal, strict=True) if not same]


def _untie(decisions: Decisions, conflicts: list[Check], options: LoadOptions) -> tuple[Row, ...]:
    """Tied names with different values: refused under ``strict``, else each gets its own tensor."""
    if not conflicts:
        return decisions.rows
    if options.strict:
        raise PlanError(
            f"{decisions.source} does not fit {decisions.module}; nothing was changed",
            [
                Problem(
                    "tied in the module, but the checkpoint has two different values",
                    key=check.other.key,
                    fqn=check.other_fqn,
                    file=check.other.entry.file,
                    start=check.other.entry.start if check.other.entry.file else None,
                    end=check.other.entry.end if check.other.entry.file else None,
                    expected=f"the bytes of {check.offer.key}",
                    hint="build the module untied, or pass strict=False to untie them",
                )
                for check in conflicts
            ],
        )
    untied = {check.other_fqn: check for check in conflicts}
    for check in conflicts:
        _log.warning(
            "%s and %s are tied in %s but differ in %s: they are untied",
            check.fqn, check.other_fqn, decisions.module, decisions.source,
        )  # fmt: skip
    first_free = 1 + max(row.target for row in decisions.rows)
    return tuple(
        replace(
            row,
            action=Action.LOADED,
            offer=untied[row.fqn].other,
            tied_to=None,
            target=first_free + number,
            in_place=False,
        )
        if row.fqn in untied
        else row
        for number, row in enumerate(decisions.rows)
    )


class _Application:
    """One execution of a plan."""

    def __init__(
        self,
        decisions: Decisions,
        rows: tuple[Row, ...],
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
        self._groups: dict[int, list[tuple[Row, Slot]]] = {}
        for row in rows:
            self._groups.setdefault(row.target, []).append((row, slots[row.fqn]))
        self._untied = {row.fqn for row, old in zip(rows, decisions.rows, strict=True) if row is not old}

    def run(self) -> nn.Module:
        loaded, rest = self._split()
        jobs = [self._job(row, slot) for row, slot in loaded]
        supplied = self._supplied(loaded)
        tasks = self._initialisers(rest, supplied)
        values = run(
            jobs,
            tasks,
            files=self._source.files,
            tensors=self._source.tensors,
            copy=self._options.copy,
            workers=self._options.workers,
            memory_budget_bytes=self._options.memory_budget_bytes,
            progress=self._options.progress,
            cancel=self._options.cancel,
            trace=self._trace,
        )
        began = 0.0 if self._trace is None else self._trace.now()
        for record in supplied:
            record.last = None  # the values are there; what the constructor would have done is history
        for (row, _), job, value in zip(loaded, jobs, values, strict=True):
            self._assign(row, value if job.into is None else None)
        for row, slot in rest:
            self._own(row, slot)
        self._finish_modules()
        self._audit()
        if self._trace is not None:
            self._trace.add("assign", "the module", began)
        return self._subject.inventory.module

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

    def _job(self, row: Row, slot: Slot) -> Job:
        assert row.offer is not None
        device = torch.device(row.device)
        entry = row.offer.entry
        if entry.shape != row.shape:
            entry = replace(entry, shape=row.shape)  # a one-element vector for a scalar
        tensor = slot.tensor
        if is_lazy(tensor) or not row.in_place:
            return Job(row.fqn, entry, row.dtype, device)
        record = self._subject.record_of(tensor)
        if record is not None:
            record.memory()
        return Job(row.fqn, entry, tensor.dtype, tensor.device, into=tensor.detach())

    def _supplied(self, loaded: Iterable[tuple[Row, Slot]]) -> set[Record]:
        """Tapes that need not run: what is read covers their whole storage, or replaces it."""
        supplied = set()
        for row, slot in loaded:
            if row.fqn in self._untied or is_lazy(slot.tensor):
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
        recorder.label_samples(self._owned(recorder))
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

    def _owned(self, recorder: Recorder) -> list[Record]:
        slots = self._subject.inventory.slots
        found = (recorder.record_of(slot.tensor) for slot in slots if not is_lazy(slot.tensor))
        return list(dict.fromkeys(record for record in found if record is not None))

    # -- assignment ---------------------------------------------------------------------------------------------------

    def _assign(self, row: Row, value: torch.Tensor | None) -> None:
        """Give every name of a target its value; None: it was filled in place."""
        members = self._groups[row.target]
        done: dict[int, torch.Tensor] = {}
        for _, slot in members:
            tensor = slot.tensor
            if id(tensor) in done:
                if done[id(tensor)] is not tensor:
                    slot.put(done[id(tensor)])
                continue
            new = self._moved(row, tensor) if value is None else value
            done[id(tensor)] = tensor if new is None else _adopt(slot, new, fresh=slot.fqn in self._untied)

    def _moved(self, row: Row, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor's value with the dtype and on the device of the plan; None when it has them already."""
        device = torch.device(row.device)
        if tensor.dtype == row.dtype and tensor.device == device:
            return None
        return tensor.detach().to(device=device, dtype=row.dtype)

    def _own(self, row: Row, slot: Slot) -> None:
        """A target that nothing was read for: its own value, cast and moved."""
        if is_lazy(slot.tensor) or slot.tensor.is_meta:
            return
        self._assign(row, None)

    def _finish_modules(self) -> None:
        """Extra state and the hooks that ``load_state_dict`` runs at the end."""
        wanted = set(self._decisions.extra_state)
        modules = self._subject.inventory.modules
        for prefix, module in modules:
            if (name := f"{prefix}_extra_state") in wanted:
                module.set_extra_state(self._source.extras[name])
        missing = [row.fqn for row in self._decisions.rows if row.action is Action.INITIALISED and not row.excused]
        for _, module in reversed(modules):
            for hook in module._load_state_dict_post_hooks.values():
                keys = torch.nn.modules.module._IncompatibleKeys(missing, list(self._decisions.unexpected_keys))
                hook(module, keys)

    def _audit(self) -> None:
        """Law 4: no tensor leaves on ``meta`` or without its values."""
        problems = []
        for slot in Inventory.of(self._subject.inventory.module).slots:
            record = None if is_lazy(slot.tensor) else self._subject.record_of(slot.tensor)
            if slot.tensor.is_meta or (record is not None and record.pending):
                problems.append(
                    Problem(
                        f"the {slot.kind} was built without a value, and the checkpoint has none",
                        fqn=slot.fqn,
                        hint="build it outside torch.device('meta'), or add it to the checkpoint",
                    )
                )
        if problems:
            raise TransferError("the module is not complete", problems)


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
