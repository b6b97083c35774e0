"""`load`, `plan` and `defer`: the only file that sees every stage.

    open_checkpoint → construct → offers (key mapping, state-dict hooks) → match → apply
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from weightlift.ambient import outside_modes
from weightlift.checkpoint import Checkpoint, open_checkpoint
from weightlift.checkpoint.integrity import digests_of
from weightlift.deferred.construct import CurrentLoad, construct
from weightlift.deferred.inventory import Inventory, is_lazy
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.tape import needed, replays
from weightlift.distributed.paper import MeshReport, on_mesh
from weightlift.distributed.placing import MeshShape, Placements
from weightlift.distributed.together import Together
from weightlift.errors import PlanError, Problem
from weightlift.options import (
    DEFAULT_RANK_PATIENCE_SECONDS,
    DeviceOption,
    DtypeOption,
    KeyMapping,
    LoadOptions,
    Parallelize,
    ProgressOption,
)
from weightlift.plan.records import Decisions
from weightlift.plan.report import LoadReport, as_json, report, table
from weightlift.supply import decide
from weightlift.transfer.accelerator import require_devices
from weightlift.transfer.apply import apply
from weightlift.transfer.subject import Bytes, Subject
from weightlift.transfer.ties import settled
from weightlift.transfer.trace import Trace, timed

_log = logging.getLogger("weightlift")
_Module = TypeVar("_Module", bound=nn.Module)
CheckpointSource = str | os.PathLike[str] | Mapping[str, torch.Tensor] | Checkpoint


class LoadPlan:
    """What a load will do, decided from headers alone: print it, read it, execute it.

    ``str(plan)`` is a table, ``plan.report`` a `LoadReport`, ``plan.to_json()`` plain data, ``plan.problems`` what
    speaks against it, ``plan.ranks`` what every rank of a ``mesh_shape`` would do. A plan made from a callable holds
    the deferred module and can be executed once.
    Reading a plan is safe from any thread; ``execute`` is for one.
    """

    def __init__(
        self,
        decisions: Decisions,
        subject: Subject,
        source: Bytes,
        options: LoadOptions,
        take: Callable[[], Subject] | None = None,
        trace: Trace | None = None,
        together: Together | None = None,
    ) -> None:
        self.decisions = decisions
        self._subject: Subject | None = subject
        self._source = source
        self._options = options
        self._take = take  # uses up the handle that the plan was made from
        self._trace = trace
        self._together = together  # what there is to do besides when the module is spread over ranks
        self.ranks: MeshReport | None = None
        self._once = threading.Lock()
        self._final: Decisions | None = None

    @property
    def report(self) -> LoadReport:
        """The lists of loaded, tied, initialised, kept, missing, unexpected and mismatched names.

        Once the plan was executed also what its checks found (``left_out``, names that were untied).
        """
        return report(self._final or self.decisions)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What makes `execute` refuse; empty when it will not."""
        return self.decisions.problems

    def __str__(self) -> str:
        return table(self.decisions) if self.ranks is None else f"{table(self.decisions)}\n\n{self.ranks}"

    def __repr__(self) -> str:
        return f"<LoadPlan of {self.decisions.module}: {str(self.report).splitlines()[0]}>"

    def to_json(self, *, indent: int | None = None) -> str:
        """The plan as JSON text: every tensor with action, key, file, byte range, dtypes and device."""
        ranks = {} if self.ranks is None else {"mesh": self.ranks.as_json()}
        return json.dumps(as_json(self.decisions) | ranks, indent=indent)

    def execute(self) -> nn.Module:
        """Carry the plan out and return the module, whole.

        Raises PlanError when ``problems`` speak against it or tied names turn out to differ (nothing was changed),
        TransferError when reading fails, LoadCancelled, RuntimeError on a second call.
        """
        if self.problems:
            raise PlanError(
                f"{self.decisions.source} does not fit {self.decisions.module}; nothing was changed", self.problems
            )
        with self._once:
            if self._subject is None:
                raise RuntimeError("this plan was executed already: its module has its values")
        with contextlib.nullcontext() if self._together is None else self._together.loading():
            with outside_modes(), timed(self._trace, "check", "devices and tied names"):
                # Both may refuse; until then nothing is used up, so that the plan can be executed again.
                require_devices(self.decisions)
                settle = settled if self._together is None else self._together.settled
                final = settle(self.decisions, self._source, self._options)
            module = self._apply(final, self._used())
        self._final = final
        _log_outcome(final)
        return module

    def _used(self) -> Subject:
        """The module, for this execution alone if it was built for the plan."""
        with self._once:
            subject = self._subject
            if subject is None:
                raise RuntimeError("this plan was executed already: its module has its values")
            if not subject.existing:
                self._subject = None
        if self._take is not None:
            self._take()
        return subject

    def _apply(self, final: Decisions, subject: Subject) -> nn.Module:
        """Apply; the trace is written also of a load that fails, which is when one looks at it."""
        trace = self._trace
        carry_out = apply if self._together is None else self._together.execute
        if trace is None or self._options.trace is None:
            return carry_out(final, subject, self._source, self._options)
        try:
            return carry_out(final, subject, self._source, self._options, trace)
        finally:
            trace.sample()
            trace.write(self._options.trace, title=f"{self.decisions.source} into {self.decisions.module}")


class Deferred:
    """A module that was built without memory and without initialisation, and has no values yet.

    The module itself stays inside until `load` or `materialize` has made it whole; either can be done once.
    """

    def __init__(self, module: nn.Module, recorder: Recorder | None, seed: int | None) -> None:
        self._subject: Subject | None = Subject(Inventory.of(module), recorder)
        self._once = threading.Lock()
        self._seed = seed
        self.name = type(module).__qualname__
        tensors = {id(slot.tensor): slot for slot in self._subject.inventory.slots}
        parameters = [slot.tensor for slot in tensors.values() if slot.kind == "parameter" and not is_lazy(slot.tensor)]
        buffers = [slot.tensor for slot in tensors.values() if slot.kind == "buffer" and not is_lazy(slot.tensor)]
        self.numel = sum(tensor.numel() for tensor in parameters)
        self.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in parameters)
        self.buffer_nbytes = sum(tensor.numel() * tensor.element_size() for tensor in buffers)
        self.forced = {} if recorder is None else dict(recorder.forced)

    def __repr__(self) -> str:
        return f"<Deferred {self.name}: {self.numel:,} parameters, {self.nbytes:,} bytes>"

    def plan(
        self,
        ckpt: CheckpointSource,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> LoadPlan:
        """Plan loading ``ckpt`` into this module. The same options as `weightlift.load`; executing it uses this up."""
        if options.get("seed") is None:
            options["seed"] = self._seed
        made = LoadOptions.create(**options)
        trace, together = _trace(made), Together(made)
        with together.planning():
            with timed(trace, "open", "headers"):
                checkpoint = together.open(
                    lambda: open_checkpoint(ckpt, revision=revision, token=token, local_files_only=local_files_only)
                )
            return _plan(self._peek(), checkpoint, made, together, take=self._take, trace=trace)

    def load(self, ckpt: CheckpointSource, **options: Any) -> nn.Module:
        """Load ``ckpt`` and return the module. The same options and errors as `weightlift.load`."""
        return self.plan(ckpt, **options).execute()

    def materialize(self) -> nn.Module:
        """Run the recorded initialisers and return the module, initialised as its constructor meant.

        Values that are sampled depend on the seed and the parameter's name alone, not on order or threads.
        """
        subject = self._take()
        recorder = subject.recorder
        if recorder is not None:
            with outside_modes():
                owned = _owned(subject)
                recorder.label_samples(owned)
                for replay in replays(needed(owned)):
                    replay.run(recorder.seed)
                for record in owned:
                    record.memory()
        return subject.inventory.module

    def _peek(self) -> Subject:
        if self._subject is None:
            raise RuntimeError(f"this {self.name} has been loaded or materialised already")
        return self._subject

    def _take(self) -> Subject:
        with self._once:
            subject = self._peek()
            self._subject = None
            return subject


def defer(build: Callable[[], nn.Module], *, seed: int | None = None) -> Deferred:
    """Run a module's constructor with nothing allocated and nothing initialised.

    ``build`` takes no argument and returns a ``torch.nn.Module``; it runs in the calling thread, other threads are not
    affected. Values that the constructor reads are right; see docs/deferred.md for what it may do. ``seed``
    (None: ``torch.initial_seed()``) seeds what is sampled. Raises what ``build`` raises.
    """
    used = torch.initial_seed() if seed is None else int(seed)
    module, recorder = construct(build, CurrentLoad(source=None, deferred=True, seed=used))
    return Deferred(module, recorder, used)


def plan(
    module: nn.Module | Callable[[], nn.Module],
    ckpt: CheckpointSource,
    *,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    device_map: Mapping[str, DeviceOption] | None = None,
    strict: bool = True,
    ignore_mismatched: bool = False,
    key_mapping: KeyMapping | None = None,
    copy: bool = False,
    workers: int | None = None,
    memory_budget_bytes: int | None = None,
    seed: int | None = None,
    progress: ProgressOption = None,
    cancel: threading.Event | None = None,
    defer: bool = True,
    trace: str | os.PathLike[str] | None = None,
    verify: bool = False,
    parallelize: Parallelize | None = None,
    source_rank: int | None = None,
    process_group: Any = None,
    rank_patience_seconds: float = DEFAULT_RANK_PATIENCE_SECONDS,
    mesh_shape: MeshShape | None = None,
    placements: Placements = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> LoadPlan:
    """Decide what `load` with the same arguments would do, from headers alone.

    With ``mesh_shape``, sizes or names with sizes as in ``{"fsdp": 128, "tp": 8}``, the plan also says what every
    rank of such a mesh would read and hold; no process group is needed. ``placements`` maps patterns of names to one
    torch placement an axis, or is a function of name and shape; None goes by the names of the axes (docs/scale.md).

    A plan that does not fit is returned like any other, with its ``problems``. Raises CheckpointError for a checkpoint
    that breaks its format, and what the constructor raises.
    """
    options = LoadOptions.create(
        dtype=dtype,
        device=device,
        device_map=device_map,
        strict=strict,
        ignore_mismatched=ignore_mismatched,
        key_mapping=key_mapping,
        copy=copy,
        workers=workers,
        memory_budget_bytes=memory_budget_bytes,
        seed=seed,
        progress=progress,
        cancel=cancel,
        defer=defer,
        trace=trace,
        verify=verify,
        parallelize=parallelize,
        source_rank=source_rank,
        process_group=process_group,
        rank_patience_seconds=rank_patience_seconds,
    )
    record, together = _trace(options), Together(options)
    with together.planning():
        options = together.seeded(options, seed)
        with timed(record, "open", "headers"):
            checkpoint = together.open(
                lambda: open_checkpoint(ckpt, revision=revision, token=token, local_files_only=local_files_only)
            )
        with timed(record, "construct", "the module"):
            subject = _subject(module, checkpoint, options)
        made = _plan(subject, checkpoint, options, together, trace=record)
    if mesh_shape is not None:
        made.ranks = on_mesh(made.decisions, mesh_shape, placements)
    return made


def load(
    module: _Module | Callable[[], _Module],
    ckpt: CheckpointSource,
    *,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    device_map: Mapping[str, DeviceOption] | None = None,
    strict: bool = True,
    ignore_mismatched: bool = False,
    key_mapping: KeyMapping | None = None,
    copy: bool = False,
    workers: int | None = None,
    memory_budget_bytes: int | None = None,
    seed: int | None = None,
    progress: ProgressOption = None,
    cancel: threading.Event | None = None,
    defer: bool = True,
    trace: str | os.PathLike[str] | None = None,
    verify: bool = False,
    parallelize: Parallelize | None = None,
    source_rank: int | None = None,
    process_group: Any = None,
    rank_patience_seconds: float = DEFAULT_RANK_PATIENCE_SECONDS,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> _Module:
    """Put a checkpoint's weights into a module and return it, whole.

    Args:
        module: a zero-argument callable, built deferred and returned complete; or a module, filled in place: its
            parameters stay the same objects, in the same memory where dtype and device stay.
        ckpt: a ``.safetensors``, ``.pt`` or ``.bin`` file, an index, a folder, a hub id, a mapping of tensors, or what
            `open_checkpoint` returned.
        dtype: None keeps the module's own dtypes, as ``load_state_dict`` does; "auto" takes the checkpoint's; a
            ``torch.dtype`` applies to all floating-point tensors, missing ones and non-persistent buffers too; a
            mapping of fqn patterns (``fnmatch``, the first that matches decides) to any of these.
        device: where every tensor goes; None leaves the module's own.
        device_map: fqn prefix → device, the longest prefix decides, "" is the rest.
        strict: refuse missing and unexpected keys, and tied names with different values. A name that a tied one
            provides is not missing.
        ignore_mismatched: initialise a tensor whose shape differs in the checkpoint, instead of refusing.
        key_mapping: regular expression → replacement, applied to every key; or a callable key → name (None: drop it).
        copy: False maps the files where dtype and device allow (copy-on-write, nothing is ever written back); True
            gives every tensor memory of its own.
        workers: threads that read; None is ``HF_PARALLEL_LOADING_WORKERS`` or 8. Never changes a value.
        memory_budget_bytes: bound on what is in flight besides the result; None is 512 MiB.
        seed: of the initialisers of missing weights; None is ``torch.initial_seed()``, read, not drawn from.
        progress: True for a bar in bytes, False for none, None for a bar where it helps; or a callable that gets bytes
            done and bytes in all.
        cancel: an event that stops the load.
        defer: False calls the constructor ordinarily.
        trace: a file for a timeline of the load: a page (``.html``), else Chrome trace events as JSON.
        verify: also hash every file, while it is read, and compare with what is written down: blob names of the hub's
            cache, or ``SHA256SUMS`` beside the files. False does not look for damaged content.
        parallelize: a function that spreads the module over a mesh (``fully_shard``, ``parallelize_module``), called
            with the module as shapes; it returns the module, a wrapper of it, or None. Every rank then reads the byte
            ranges of its own local shards. See docs/distributed.md.
        source_rank: the only rank that can see the files. With ``parallelize`` it streams to the others what they
            keep; without, the others get a module for another engine (DDP, FSDP1, accelerate) to fill.
        process_group: the ranks that load together; None is all of them.
        rank_patience_seconds: how long a rank may show no sign of life before all others raise.
        revision, token, local_files_only: for a hub id, as ``huggingface_hub`` takes them.

    Raises:
        CheckpointError: the checkpoint breaks its format; or ``verify`` and no hash is known for a file.
        CheckpointCorrupt: ``verify`` found other content than the hash says.
        PlanError: module and checkpoint do not fit; every problem in one error, nothing was read or changed.
        TransferError: a read failed; for an existing module it names what had been written.
        LoadCancelled: ``cancel`` was set.
        RanksError: with several ranks, they do not load the same, or another one failed.

    Thread-safety: any number of loads may run at once, in any threads, of the same or of other checkpoints; no state
    of the process is written. One module must not be loaded into from two threads.
    """
    made = plan(
        module, ckpt,
        dtype=dtype, device=device, device_map=device_map, strict=strict, ignore_mismatched=ignore_mismatched,
        key_mapping=key_mapping, copy=copy, workers=workers, memory_budget_bytes=memory_budget_bytes, seed=seed,
        progress=progress, cancel=cancel, defer=defer, trace=trace, verify=verify,
        parallelize=parallelize, source_rank=source_rank, process_group=process_group,
        rank_patience_seconds=rank_patience_seconds, revision=revision, token=token,
        local_files_only=local_files_only,
    )  # fmt: skip
    return made.execute()  # type: ignore[return-value]


def _subject(
    module: nn.Module | Callable[[], nn.Module], checkpoint: Checkpoint, options: LoadOptions
) -> Subject:
    if isinstance(module, nn.Module):
        return Subject(Inventory.of(module), None, existing=True)
    if not callable(module):
        raise TypeError(f"expected a torch.nn.Module or a callable that builds one, found {type(module).__name__}")
    load = CurrentLoad(source=checkpoint.source, deferred=options.defer, seed=options.seed)
    built, recorder = construct(module, load)
    return Subject(Inventory.of(built), recorder)


def _trace(options: LoadOptions) -> Trace | None:
    return None if options.trace is None else Trace()


def _plan(
    subject: Subject,
    checkpoint: Checkpoint,
    options: LoadOptions,
    together: Together,
    *,
    take: Callable[[], Subject] | None = None,
    trace: Trace | None = None,
) -> LoadPlan:
    with timed(trace, "plan", "headers against names"):
        supplied = decide(subject, checkpoint, options)
    decisions, subject = supplied.decisions, supplied.subject
    digests = digests_of(checkpoint.files, checkpoint.index) if options.verify else {}
    source = replace(supplied.source, digests=digests)
    spread = together.settle(decisions, subject)
    return LoadPlan(decisions, subject, source, options, take, trace, together if spread else None)


def _owned(subject: Subject) -> list[Any]:
    found = (subject.record_of(slot.tensor) for slot in subject.inventory.slots if not is_lazy(slot.tensor))
    return list(dict.fromkeys(record for record in found if record is not None))


def _log_outcome(decisions: Decisions) -> None:
    """One record a load: INFO, or a warning that names what did not match. Of ties `settled` has told."""
    summary = report(decisions)
    warning = summary.warning()
    _log.log(
        logging.WARNING if warning else logging.INFO,
        "%s into %s: %s", decisions.source, decisions.module, warning or summary.headline(),
    )  # fmt: skip
