"""Running a constructor so that nothing is allocated and nothing is initialised, and saying which load it runs for."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightlift.ambient import Undisturbed, no_dispatch_modes, outside_modes
from weightlift.deferred.bystanders import Bystanders
from weightlift.deferred.defaults import WantedDtype
from weightlift.deferred.functions import Answer, FunctionRecorder
from weightlift.deferred.inventory import (
    Inventory,
    Slot,
    has_other_users,
    held_elsewhere,
    storage_address,
    users_of,
)
from weightlift.deferred.neighbours import known
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.replay import needed
from weightlift.deferred.tape import Record
from weightlift.forked import settle
from weightlift.locks import LOADING

_GARBAGE_BYTES = 16 << 20
_storage_users = torch._C._storage_Use_Count


@dataclass(frozen=True, slots=True)
class CurrentLoad:
    """The load that a constructor runs for.

    ``source`` is the checkpoint as it was named (None under `weightlift.defer`), ``deferred`` whether tensor work is
    put off, ``seed`` the seed of missing weights.
    """

    source: str | None
    deferred: bool
    seed: int


_current: ContextVar[tuple[int, CurrentLoad] | None] = ContextVar("weightlift.current_load", default=None)


def current_load() -> CurrentLoad | None:
    """Inside a constructor: the load it runs for, the innermost of its own thread. Elsewhere None.

    Helper threads that a constructor starts are not part of the load, whether or not they copied the context.
    """
    found = _current.get()
    if found is None or found[0] != threading.get_ident():
        return None
    return found[1]


def recording() -> tuple[Recorder, ...]:
    """The recorders in whose scope the calling thread is: those of a constructor that it runs."""
    modes = (torch._C._get_dispatch_stack_at(place) for place in range(torch._C._len_torch_dispatch_stack()))
    return tuple(mode for mode in modes if isinstance(mode, Recorder))


@contextlib.contextmanager
def _announced(load: CurrentLoad) -> Iterator[None]:
    token = _current.set((threading.get_ident(), load))
    try:
        yield
    finally:
        _current.reset(token)


def construct(
    build: Callable[[], nn.Module],
    load: CurrentLoad,
    *,
    default_dtype: WantedDtype = None,
    answers: Mapping[Any, Answer] | None = None,
) -> tuple[Inventory, Recorder | None]:
    """Call ``build``, deferred where ``load.deferred`` says so. Returns the module with its slots, and the recorder of
    its tapes.

    ``default_dtype``: what ``build`` shall find to be the default dtype, or a function that says so for the frame of a
    call; torch's own is not set. ``answers``: torch
    functions to functions that are asked first, with the caller's frame, and return NotImplemented to decline.
    Values that live outside the module's parameters and buffers (tables in lists or caches) are computed before this
    returns. Raises what ``build`` raises, and TypeError when it does not return a module.
    """
    settle()
    grad = torch.is_grad_enabled()  # before inference mode is left, which enables it
    # A module that is built under inference mode could not be used outside of it; a load's result can.
    with Undisturbed(), LOADING.shared(), _announced(load), torch.inference_mode(False), torch.set_grad_enabled(grad):
        if not load.deferred:
            return Inventory.of(_checked(build())), None
        recorder = Recorder(seed=load.seed, default_dtype=default_dtype)
        with known(recorder):
            try:
                return _recorded(build, recorder, answers or {}), recorder
            except BaseException:
                _leave(recorder)
                raise


def _recorded(build: Callable[[], nn.Module], recorder: Recorder, answers: Mapping[Any, Answer]) -> Inventory:
    bystanders = Bystanders()
    asked = {torch.Tensor.to: bystanders.stays, **answers}
    # Modes of the caller's are not asked: a load is not part of what they watch, a nested load least of all.
    with no_dispatch_modes(), FunctionRecorder(recorder, answers=asked), recorder:
        module = _checked(build())
    recorder.default = None
    with outside_modes():
        bystanders.undo(module)
        inventory = Inventory.of(module)
        _finish(inventory, recorder)
    return inventory


def extend(module: nn.Module, recorder: Recorder, load: CurrentLoad, work: Callable[[], None]) -> Inventory:
    """Do more of the constructor's work on a module that `construct` built, as deferred as the rest: an initialisation
    that is decided on later, for one. Runs without autograd. Returns the module with the slots that it has then. Raises
    what ``work`` raises."""
    with Undisturbed(), _announced(load), no_dispatch_modes(), FunctionRecorder(recorder), recorder, torch.no_grad():
        work()
    with Undisturbed(), outside_modes():
        inventory = Inventory.of(module)
        _finish(inventory, recorder)
    return inventory


def _checked(module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"the callable must return a torch.nn.Module, found {type(module).__qualname__}")
    return module


def _finish(inventory: Inventory, recorder: Recorder) -> None:
    """Label what belongs to the module; give everything else that is still alive its values."""
    owned: set[Record] = set()
    tables: list[Slot] = []  # of which there may be one for many modules, in a cache
    for slot in inventory.slots:
        record = recorder.record_of(slot.tensor)
        if record is None:
            continue
        if record not in owned:
            owned.add(record)
            record.label = slot.fqn
        last = record.last
        if last is None or last.done or last.random:
            continue
        if slot.kind == "buffer" or _storage_users(record.key) > 1:
            tables.append(slot)
    if tables:
        recorder.force(_held_besides(tables, recorder), "a table that somebody holds besides the module")
    if len(owned) == len(recorder.records):
        return
    others = [record for record in list(recorder.records.values()) if record not in owned]
    if sum(record.nbytes for record in others if record.pending) >= _GARBAGE_BYTES:
        gc.collect()  # modules that the constructor threw away may hang in reference cycles
        others = [record for record in others if record() is not None]
    orphans = [record for record in others if record.pending]
    recorder.force(orphans, "tensors outside the module's parameters and buffers")
    for record in others:
        if record() is not None and not record.opened:
            record.memory()


def _leave(recorder: Recorder) -> None:
    """The constructor has failed. What it left in a cache serves the next one."""
    with contextlib.suppress(Exception):
        pending = [record for record in list(recorder.records.values()) if record.pending]
        recorder.force(_unsampled(pending), "tables of a constructor that failed")


def _unsampled(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if not any(node.random for node in needed([record]))]


def _held_besides(slots: list[Slot], recorder: Recorder) -> list[Record]:
    """The records of ``slots`` that lie in other hands as well, perhaps a cache's, which outlives a load that is
    refused or never done; but for samples, whose values come of the load's seed and the names that they are for."""
    held = held_elsewhere(slots)
    addresses = [storage_address(slot.tensor) for slot in slots]
    users = users_of(slots, addresses)
    found: dict[Record, None] = {}
    for slot, address in zip(slots, addresses):
        record = recorder.records[address]
        if id(slot.tensor) in held or has_other_users(slot.tensor, address, users[address]):
            found[record] = None
    return _unsampled(found)
