"""``source_rank`` without ``parallelize``: the other ranks get a module that another engine will fill.

FSDP1's ``sync_module_states``, DistributedDataParallel and accelerate send a module's parameters from one rank to the
others. Until then these hold address space without memory. Buffers that no checkpoint holds have their values, because
not every such engine sends those; the others come with the parameters, and are until then as the constructor made them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from weightlift.ambient import outside_modes
from weightlift.deferred.inventory import is_lazy
from weightlift.deferred.reserve import Reservations, open_range
from weightlift.plan.records import Action, Row
from weightlift.transfer.accelerator import same_device
from weightlift.transfer.apply import apply
from weightlift.transfer.subject import Load, Subject
from weightlift.unstrided import unstrided


def leave_unfilled(load: Load) -> nn.Module:
    """The module of a rank that opens no file: buffers computed, parameters of the planned dtype and without values.

    What was not built deferred, such as a user's module, keeps its values, in the dtype and on the device of the plan.
    """
    decisions, subject = load.decisions, load.subject
    if subject.recorder is None:
        return _converted(load)
    with outside_modes():
        untouched, untied = Reservations(), dict[int, nn.Parameter]()
        for slot, row in zip(subject.inventory.slots, decisions.rows, strict=True):
            if slot.kind == "parameter" and not is_lazy(slot.tensor):
                _leave(slot.tensor, row, subject, untouched)
                if row.untied:
                    slot.put(untied.setdefault(row.target, _another(slot.tensor, row, untouched)))
        rows = tuple(_computed(row) for row in decisions.rows if row.kind == "buffer")
        slots = tuple(slot for slot in subject.inventory.slots if slot.kind == "buffer")
        inventory = replace(subject.inventory, slots=slots)
        return apply(load.of_rows(rows, replace(subject, inventory=inventory)))


def _converted(load: Load) -> nn.Module:
    decisions, subject = load.decisions, load.subject
    slots, untied = [], dict[int, nn.Parameter]()
    with outside_modes():
        for slot, row in zip(subject.inventory.slots, decisions.rows, strict=True):
            if row.untied and slot.kind == "parameter":
                own = slot.tensor.detach().clone()
                new = untied.setdefault(row.target, nn.Parameter(own, requires_grad=slot.tensor.requires_grad))
                slot.put(new)
                slot = slot._replace(tensor=new)
            slots.append(slot)
        rows = tuple(map(_computed, decisions.rows))
        return apply(load.of_rows(rows, replace(subject, inventory=replace(subject.inventory, slots=tuple(slots)))))


def _another(tensor: torch.Tensor, row: Row, untouched: Reservations) -> nn.Parameter:
    """A parameter of its own for a name that leaves its tie."""
    values = _zeros(tensor.shape, row.dtype, torch.device(row.device), untouched)
    return nn.Parameter(values, requires_grad=tensor.requires_grad)


def _leave(tensor: torch.Tensor, row: Row, subject: Subject, untouched: Reservations) -> None:
    record = subject.record_of(tensor)
    if record is not None:
        record.last = None
        record.memory()
    device = torch.device(row.device)
    if unstrided(tensor):
        return  # what the constructor made is its value
    if tensor.dtype != row.dtype or not same_device(tensor.device, device):
        tensor.data = _zeros(tensor.shape, row.dtype, device, untouched)


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device, untouched: Reservations) -> torch.Tensor:
    """Zeros that on a CPU take up memory when somebody writes to them; ``torch.zeros`` writes to its own."""
    nbytes = shape.numel() * dtype.itemsize
    if device.type != "cpu" or not nbytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    buffer, block, offset = untouched.reserve(nbytes)
    open_range(buffer, block, offset)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)


def _computed(row: Row) -> Row:
    """What was to be loaded keeps what it has: its value comes with the parameters."""
    if row.action in (Action.LOADED, Action.TIED):
        return row._replace(action=Action.KEPT, offer=None, parts=(), tied_to=None)
    return row
