"""Tensors that stand for others: the values of a checkpoint that nobody has read, the tensors of a module left alone.

A stand-in is a deferred tensor with one recorded call, which fetches the value. Reading it runs that call; renaming it,
copying it elsewhere or handing it on runs nothing, and what became of it can be told afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightlift.ambient import outside_modes
from weightlift.deferred.calls import DTYPES
from weightlift.deferred.inventory import is_lazy
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.schema import is_plain
from weightlift.deferred.tape import Node, Operation, Record, ViewRef
from weightlift.unstrided import unstrided

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Offered:
    """A value of the checkpoint as it is there, in row-major order: the name it is offered under, and in what shape."""

    name: str
    shape: tuple[int, ...]


class _Own:
    """The value that a tensor of the module has already."""


OWN = _Own()
Origin = Offered | _Own | None


class StandIns:
    """The stand-ins of one rehearsal. Must be made and used in the thread, and within the scope, of ``recorder``.

    ``read`` fetches an offered value by its name; ``settle`` is called on a tensor of the module before it is read.
    ``shared`` are the addresses of storages that several tensors of the module lie on: their stand-ins share one, too.
    """

    def __init__(
        self, recorder: Recorder, read: Callable[[str], torch.Tensor], settle: Callable[[torch.Tensor], None]
    ) -> None:
        self.early: list[str] = []
        self.shared: set[int] = set()
        self._recorder = recorder
        self._read = read
        self._settle = settle
        self._offers: dict[Record, tuple[str, torch.dtype]] = {}
        self._first: dict[Record, Node | None] = {}  # how each stand-in began
        self._empty: dict[int, tuple[torch.Tensor, str]] = {}
        self._storages: dict[int, torch.Tensor] = {}

    # -- making them --------------------------------------------------------------------------------------------------

    def offered(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A row-major tensor on the CPU for the value that the checkpoint offers as ``name``."""
        numel = math.prod(shape)
        if numel and dtype in DTYPES:
            tensor = self._recorder.bear(shape, numel, dtype)
        else:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
        record = self._recorder.record_of(tensor)
        if record is None:  # nothing to put off in an empty tensor
            self._empty[id(tensor)] = tensor, name
            return tensor
        self._recorder.record_source(tensor, lambda target: self._fetch(name, target))
        self._offers[record] = name, dtype
        self._first[record] = record.last
        return tensor

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor for one of the module's, with a value of its own that is copied from it when somebody looks.

        Tensors that share a storage get stand-ins that do. Keeps class, strides and ``requires_grad``; the device is
        the CPU.
        """
        # Looking at storages is what the function mode takes for giving memory away.
        with torch._C.DisableTorchFunction():
            return _lazy_like(tensor) if is_lazy(tensor) else self._own_like(tensor)

    def _own_like(self, tensor: torch.Tensor) -> torch.Tensor:
        made = self._own_data(tensor)
        if unstrided(tensor):
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        if type(tensor) is not torch.Tensor:
            fallback = nn.Parameter if isinstance(tensor, nn.Parameter) else torch.Tensor
            kind = type(tensor) if is_plain(type(tensor)) else fallback
            made = torch.Tensor._make_subclass(kind, made, tensor.requires_grad)
        elif tensor.requires_grad and tensor.is_leaf:
            made.requires_grad_()
        if tensor.__dict__:
            made.__dict__.update(tensor.__dict__)
        return made

    def _own_data(self, tensor: torch.Tensor) -> torch.Tensor:
        if unstrided(tensor) or tensor.is_quantized:
            return tensor.detach().clone()
        if tensor.numel() == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        odd = not is_plain(type(tensor)) or tensor.is_conj() or tensor.is_neg()
        if odd or tensor.device.type != "cpu":
            return self._own_values(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            whole = storage.nbytes() == tensor.numel() * tensor.element_size()
            if not whole and storage._cdata not in self.shared:
                return self._own_values(tensor)
            self._storages[storage._cdata] = self._own_storage(tensor, storage)
        made = self._storages[storage._cdata].untyped_storage()
        # There is nothing to record in an empty tensor and where it is put, and the way through the mode is long.
        guard = torch._C._DisableTorchDispatch()
        shown = torch.empty(0, dtype=tensor.dtype, device="cpu")
        shown.set_(made, tensor.storage_offset(), tensor.shape, tensor.stride())
        del guard
        return shown

    def _own_storage(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
        whole, record = self._recorder.reserve(storage.nbytes(), torch.uint8)

        def fill(target: torch.Tensor) -> None:
            self._settle(tensor)
            target.copy_(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage))

        self._recorder.record_source(whole, fill)
        self._first[record] = record.last
        return whole

    def _own_values(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stand-in that shares its storage with nothing."""
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        record = self._recorder.record_of(made)
        if record is None or tensor.is_meta:
            return made

        def fill(target: torch.Tensor) -> None:
            self._settle(tensor)
            target.copy_(tensor.detach())

        self._recorder.record_source(made, fill)
        self._first[record] = record.last
        return made

    def _fetch(self, name: str, target: torch.Tensor) -> None:
        self.early.append(name)
        target.copy_(self._read(name))

    # -- telling what became of them ----------------------------------------------------------------------------------

    def mark(self, tensor: torch.Tensor | None) -> object:
        """What stands written in a tensor: equal marks, nothing was written between."""
        if tensor is None or is_lazy(tensor):
            return tensor
        version = None if tensor.is_inference() else tensor._version
        return id(tensor), self._recorder.record_of(tensor), version, self.state(tensor)

    def state(self, tensor: torch.Tensor) -> object:
        """What stands written in a tensor's memory: the same for all that show it."""
        record = self.record_of(tensor)
        return None if record is None else (record.last, record.pinned, record.pieces)

    def record_of(self, tensor: torch.Tensor) -> Record | None:
        """The tape of what a tensor shows, if it has one."""
        return None if is_lazy(tensor) else self._recorder.record_of(tensor)

    def memory(self, tensor: torch.Tensor) -> object:
        """What a tensor shows a view of; a tensor that has no tape counts as its own."""
        return self.record_of(tensor) or id(tensor)

    def place(self, tensor: torch.Tensor) -> object:
        """Equal for tensors that are the same view of the same memory."""
        record = self.record_of(tensor)
        if record is None:
            return id(tensor)
        return record, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype

    def origin(self, tensor: torch.Tensor) -> Origin:
        """Where the value of a tensor comes from: an offered value, or its own, copied onto itself; else None."""
        if id(tensor) in self._empty:
            return Offered(self._empty[id(tensor)][1], tuple(tensor.shape))
        record = self._recorder.record_of(tensor)
        if record is None or record.pinned or record.at_once or tensor.layout is not torch.strided:
            return None
        here = ViewRef(record, tensor)
        if record in self._first and record.last is self._first[record]:
            return self._first_value(here)
        node = record.last
        if not isinstance(node, Operation) or node.func is not _aten.copy_.default or len(node.args) < 2:
            return None
        into, source = node.args[0], node.args[1]
        if not isinstance(source, ViewRef) or not _same_place(into, here) or source.size != here.size:
            return None
        version = dict(node.deps).get(source.record)
        if source.record in self._offers and version is self._first[source.record]:
            return self._first_value(source)
        if source.record is record and _same_place(source, here) and version is self._first.get(record):
            return OWN  # copied onto itself
        return None

    def _first_value(self, ref: ViewRef) -> Origin:
        """What a view of a stand-in shows that nothing has been done to."""
        name, dtype = self._offers.get(ref.record, (None, None))
        if name is None or dtype != ref.dtype or not ref.is_whole():
            return None
        return Offered(name, tuple(ref.size))

    def same_place(self, tensor: torch.Tensor, other: torch.Tensor) -> bool:
        """True when two tensors are the same view of one recorded storage."""
        first, second = self._recorder.record_of(tensor), self._recorder.record_of(other)
        return first is not None and first is second and _same_place(ViewRef(first, tensor), ViewRef(first, other))

    def dissolve(self) -> None:
        """Let go of the memory, and of the recorded calls, which know this object."""
        for held in (self._storages, self._empty, self._offers, self._first):
            held.clear()

    def value(self, tensor: torch.Tensor, why: str) -> torch.Tensor:
        """A copy of a tensor as it is now, row-major, in ordinary memory. Reads what that takes."""
        self._recorder.force_tensors([tensor], why)
        with outside_modes():
            return tensor.detach().clone(memory_format=torch.contiguous_format)


def _same_place(first: ViewRef, second: ViewRef) -> bool:
    return (
        first.record is second.record
        and first.offset == second.offset
        and first.size == second.size
        and first.stride == second.stride
        and first.dtype == second.dtype
        and first.lazily == second.lazily
    )


def _lazy_like(tensor: Any) -> torch.Tensor:
    """An uninitialised parameter or buffer like ``tensor``, which is one."""
    made = type(tensor)(device="cpu", dtype=tensor.data.dtype)
    made.requires_grad_(tensor.requires_grad)
    made.__dict__.update(copy.copy(tensor.__dict__))
    return made  # type: ignore[no-any-return]
