"""`load`, `plan` and `defer`: the front door, which sees every stage.

    open_checkpoint → construct → offers (key mapping, state-dict hooks) → match → apply
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import nn

from weightlift.checkpoint import Checkpoint
from weightlift.deferred.construct import CurrentLoad, construct
from weightlift.deferred.inventory import Inventory
from weightlift.distributed.fsdp import reshard
from weightlift.distributed.paper import on_mesh
from weightlift.distributed.placing import MeshShape, Placements
from weightlift.handles import CheckpointSource, Deferred, LoadPlan, opened, planned
from weightlift.options import (
    DEFAULT_RANK_PATIENCE_SECONDS,
    DeviceOption,
    DtypeOption,
    KeyMapping,
    LoadKeywords,
    LoadOptions,
    Parallelize,
    ProgressOption,
    used_seed,
)
from weightlift.transfer.subject import Subject
from weightlift.transfer.trace import timed

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Module = TypeVar("_Module", bound=nn.Module)


class PlanKeywords(LoadKeywords, total=False):
    """What `plan` takes by name, for type checkers."""

    mesh_shape: MeshShape | None
    placements: Placements


def defer(build: Callable[[], _Module], *, seed: int | None = None) -> Deferred[_Module]:
    """Run a module's constructor with nothing allocated and nothing initialised.

    ``build`` takes no argument and returns a ``torch.nn.Module``; it runs in the calling thread, other threads are not
    affected. Values that the constructor reads are right; see docs/deferred.md for what it may do. ``seed``
    (None: ``torch.initial_seed()``) seeds what is sampled.

    Raises what ``build`` raises; TypeError for what builds no module; MemoryError where the system refuses the address
    space. Thread-safe.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise TypeError(f"expected a callable that builds a module, found {_named(build)}; it takes no arguments")
    used = used_seed(seed)
    inventory, recorder = construct(build, CurrentLoad(source=None, deferred=True, seed=used))
    return Deferred(inventory, recorder, used, seed_given=seed is not None)


# A module is a callable too, one that returns anything: without overloads it would come back as ``_Module | Any``.
@overload
def plan(module: _Module, ckpt: CheckpointSource, **options: Unpack[PlanKeywords]) -> LoadPlan[_Module]: ...
@overload
def plan(
    module: Callable[[], _Module], ckpt: CheckpointSource, **options: Unpack[PlanKeywords]
) -> LoadPlan[_Module]: ...
def plan(
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
    mesh_shape: MeshShape | None = None,
    placements: Placements = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> LoadPlan[_Module]:
    """Decide what `load` with the same arguments would do, from headers alone.

    With ``mesh_shape``, sizes or names with sizes as in ``{"fsdp": 128, "tp": 8}``, the plan also says what every
    rank of such a mesh would read and hold; no process group is needed. ``placements`` maps patterns of names to one
    torch placement an axis, or is a function of name and shape; None goes by the names of the axes (docs/scale.md).

    A plan that does not fit is returned like any other, with its ``problems``. ``parallelize`` is called when
    the plan is executed. Thread-safe, as `load` is.

    Raises CheckpointError for a checkpoint that breaks its format, TypeError or ValueError for options that can't be
    meant, and what the constructor raises.
    """
    _require_module(module, ckpt)
    if placements is not None and mesh_shape is None:
        raise ValueError("placements are those of a mesh on paper: give mesh_shape too")
    options = LoadOptions.create(
        dtype=dtype, device=device, device_map=device_map, strict=strict, ignore_mismatched=ignore_mismatched,
        key_mapping=key_mapping, copy=copy, workers=workers, memory_budget_bytes=memory_budget_bytes, seed=seed,
        progress=progress, cancel=cancel, defer=defer, trace=trace, verify=verify,
        parallelize=parallelize, source_rank=source_rank, process_group=process_group,
        rank_patience_seconds=rank_patience_seconds,
    )  # fmt: skip
    hub = {"revision": revision, "token": token, "local_files_only": local_files_only}
    with opened(ckpt, options, seed=seed, **hub) as opening:
        with timed(opening.trace, "construct", "the module"):
            subject = _subject(module, opening.checkpoint, opening.options)
        made = planned(subject, opening)
    if mesh_shape is not None:
        made.ranks = on_mesh(made.decisions, mesh_shape, placements)
    return made  # type: ignore[return-value]


@overload
def load(module: _Module, ckpt: CheckpointSource, **options: Unpack[LoadKeywords]) -> _Module: ...
@overload
def load(module: Callable[[], _Module], ckpt: CheckpointSource, **options: Unpack[LoadKeywords]) -> _Module: ...
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
            parameters stay the same objects, in the same memory where dtype and device stay (those on ``meta`` are
            replaced, as ``to_empty`` does it).
        ckpt: a ``.safetensors``, ``.pt`` or ``.bin`` file, an index, a folder, a hub id, a mapping of tensors, or what
            `open_checkpoint` returned.
        dtype: None keeps the module's own dtypes, as ``load_state_dict`` does; "auto" takes the checkpoint's; a
            ``torch.dtype``, or the name of one, applies to all floating-point tensors, missing ones and non-persistent
            buffers too; a mapping of fqn patterns (``fnmatch``, the first that matches decides) to any of these.
        device: where every tensor goes; None leaves the module's own.
        device_map: fqn prefix → device, the longest prefix decides, "" is the rest.
        strict: refuse missing and unexpected keys, and tied names with different values. A name that a tied one
            provides is not missing.
        ignore_mismatched: initialise a tensor whose shape differs in the checkpoint, instead of refusing.
        key_mapping: regular expression → replacement, applied to every key; or a callable key → name (None: drop it).
        copy: False maps the files where dtype and device allow (copy-on-write, nothing is ever written back), and of a
            mapping takes the very tensors: what writes to the model then writes to them. True gives every tensor memory
            of its own, as an existing module's have where dtype and device stay.
        workers: threads that read; None is ``HF_PARALLEL_LOADING_WORKERS`` or 8, and 1 where
            ``HF_ENABLE_PARALLEL_LOADING`` says no. Never changes a value.
        memory_budget_bytes: bound on what is in flight besides the result; None is 512 MiB.
        seed: of the initialisers of missing weights; None is ``torch.initial_seed()``, read, not drawn from.
        progress: True for a bar in bytes, False for none, None for a bar where it helps; or a callable that gets bytes
            done and bytes in all.
        cancel: an event that stops the load.
        defer: False calls the constructor ordinarily.
        trace: a file for a timeline of the load: a page (``.html``), else Chrome trace events as JSON. Where it can be
            seen beforehand that it can't be written, OSError; where writing fails in the end, a logged warning.
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
        TypeError, ValueError: an option that can't be meant. MemoryError: the system refuses the address space.
        And what the constructor, hooks, ``key_mapping``, ``progress`` or ``parallelize`` raise.

    Thread-safety: any number of loads may run at once, in any threads, of the same or of other checkpoints; no state
    of the process is written. One module must not be loaded into from two threads.
    """
    made: LoadPlan[_Module] = plan(
        module, ckpt,
        dtype=dtype, device=device, device_map=device_map, strict=strict, ignore_mismatched=ignore_mismatched,
        key_mapping=key_mapping, copy=copy, workers=workers, memory_budget_bytes=memory_budget_bytes, seed=seed,
        progress=progress, cancel=cancel, defer=defer, trace=trace, verify=verify,
        parallelize=parallelize, source_rank=source_rank, process_group=process_group,
        rank_patience_seconds=rank_patience_seconds, revision=revision, token=token,
        local_files_only=local_files_only,
    )  # fmt: skip
    return made.execute()


def _subject(
    module: nn.Module | Callable[[], nn.Module], checkpoint: Checkpoint, options: LoadOptions
) -> Subject:
    if isinstance(module, nn.Module):
        reshard(module)
        return Subject(Inventory.of(module), None, existing=True)
    load = CurrentLoad(source=checkpoint.source, deferred=options.defer, seed=options.seed)
    return Subject(*construct(module, load))


def _require_module(module: object, ckpt: object) -> None:
    if isinstance(module, nn.Module) or callable(module):
        return
    found = f"found {_named(module)}"
    if isinstance(ckpt, nn.Module) or callable(ckpt):
        order = "the arguments are swapped: first the module or what builds it, then the checkpoint"
        raise TypeError(f"{order}; {found} before {_named(ckpt)}")
    raise TypeError(f"expected a torch.nn.Module or a callable that builds one, {found}")


def _named(value: object) -> str:
    return repr(value) if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
