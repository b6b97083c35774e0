"""``device_map`` entries of "disk": weights that stay in files, behind the hooks of accelerate's own dispatch.

What lies in the checkpoint as the model wants it is read from there when it is used; nothing of it is read now. What
a conversion makes, what is initialised and what comes from a pickle is written to the offload folder, one after the
other, so that no more than one of them is in memory.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import accelerate_disk_offload, expand_device_map, offload_weight

from weightlift.checkpoint import Checkpoint
from weightlift.deferred.inventory import Inventory, Slot
from weightlift.errors import PlanError, Problem, TransferError
from weightlift.integrations.exclusive import NotNative
from weightlift.plan.records import Action, Row
from weightlift.transfer.apply import apply
from weightlift.transfer.subject import Load, Subject

Group = list[tuple[Row, Slot]]


class NoFolder(PlanError, ValueError):
    """A `PlanError` that is also the ValueError which Transformers raises where an offload folder is needed."""


class Offload:
    """The part of one load that stays on disk. ``index``: as accelerate takes it."""

    def __init__(self, model: Any, files: list[str] | None, load_config: Any) -> None:
        self._config = load_config
        self.index: dict[str, dict[str, str]] = accelerate_disk_offload(
            model,
            load_config.disk_offload_folder,
            files,
            load_config.device_map,
            load_config.sharded_metadata,
            load_config.weight_mapping,
        )
        self._on_disk: list[Group] = []

    def split(self, load: Load) -> Load:
        """What is to be loaded ordinarily. Raises NotNative where a tie would be half in memory."""
        decisions, inventory = load.decisions, load.subject.inventory
        places = expand_device_map(self._config.device_map, [row.fqn for row in decisions.rows])
        groups: dict[int, Group] = {}
        for row, slot in zip(decisions.rows, inventory.slots, strict=True):
            groups.setdefault(row.target, []).append((row, slot))
        for group in groups.values():
            on_disk = [places[row.fqn] == "disk" and self._may_go(slot) for row, slot in group]
            if any(on_disk) and not all(on_disk):
                raise NotNative("a tie that is on disk in part", "accelerate's hooks decide which of them is read")
            if all(on_disk):
                self._on_disk.append(group)
        gone = {row.fqn for group in self._on_disk for row, _ in group}
        rows = tuple(row for row in decisions.rows if row.fqn not in gone)
        slots = tuple(slot for slot in inventory.slots if slot.fqn not in gone)
        subject = replace(load.subject, inventory=replace(inventory, slots=slots))
        return replace(load, decisions=replace(decisions, rows=rows), subject=subject)

    def _may_go(self, slot: Slot) -> bool:
        return slot.kind == "parameter" or (slot.persistent and bool(self._config.offload_buffers))

    def write(self, load: Load, checkpoint: Checkpoint) -> None:
        """Bring everything that stays on disk into files that accelerate can read.

        Raises, before anything is written, NoFolder where none was named, and TransferError where its disk has no room.
        """
        named = [(group, *self._name(group, checkpoint)) for group in self._on_disk]
        written = {name: group[0][0].nbytes for group, name, lies in named if not lies}
        if written:
            self._require_folder(list(written))
            self._require_room(sum(written.values()))
        for group, name, lies in named:
            if not lies:
                value = _value(load, group)
                offload_weight(value, name, self._config.disk_offload_folder, self.index)
            self.index[name]["dtype"] = str(group[0][0].dtype).removeprefix("torch.")
            for row, _ in group:
                self.index[row.fqn] = self.index[name]
            for _, slot in group:
                record = load.subject.record_of(slot.tensor)
                if record is not None:
                    record.last = None

    def _name(self, group: Group, checkpoint: Checkpoint) -> tuple[str, bool]:
        """The name that provides the value of a group, and whether a file of the checkpoint has it as it is wanted."""
        reading = next((row for row, _ in group if row.action is Action.LOADED), None)
        if reading is None:
            return group[0][0].fqn, False
        return reading.fqn, reading.fqn in self.index and _as_it_lies(reading, checkpoint)

    def _require_folder(self, names: list[str]) -> None:
        """For what lies in no safetensors file as the model wants it."""
        if self._config.disk_offload_folder is not None:
            return
        where = f"{self._config.pretrained_model_name_or_path} cannot be offloaded to disk; nothing was changed"
        what = "it has to be written anew: it is converted, initialised, or not in a safetensors file"
        hint = "pass offload_folder=, or a device_map without \"disk\" for it"
        raise NoFolder(where, [Problem(what, fqn=name, hint=hint) for name in names])

    def _require_room(self, nbytes: int) -> None:
        folder = Path(self._config.disk_offload_folder)
        if (free := shutil.disk_usage(folder).free) >= nbytes:
            return
        problem = Problem(
            "there is not enough room on the disk for what is offloaded",
            file=folder,
            expected=f"{nbytes:,} bytes",
            found=f"{free:,} bytes free",
            hint="another offload_folder, or a device_map with less on \"disk\"",
        )
        raise TransferError("loading failed", [problem])

    def leave(self) -> None:
        """Put tensors without memory in the places of what stays on disk: the hooks fill them for each forward."""
        for group in self._on_disk:
            row, first = group[0]
            with torch.inference_mode(False):  # as all that a load gives, usable outside of the caller's
                empty = torch.empty(row.shape, dtype=row.dtype, device="meta")
            if first.kind == "parameter":
                empty = nn.Parameter(empty, requires_grad=first.tensor.requires_grad)
            for _, slot in group:
                slot.put(empty)


def _as_it_lies(row: Row, checkpoint: Checkpoint) -> bool:
    """Whether a value is one whole tensor of the checkpoint."""
    offer = row.offer
    if offer is None or row.parts or offer.parts or offer.key not in checkpoint:
        return False
    return checkpoint[offer.key] == offer.entry


def _value(load: Load, group: Group) -> torch.Tensor:
    """The value of one target, in memory of its own that the model does not hold."""
    row, slot = next((item for item in group if item[0].action is Action.LOADED), group[0])
    holder = nn.Module()
    if isinstance(slot.tensor, nn.Parameter):
        holder.register_parameter("value", slot.tensor)
    else:
        holder.register_buffer("value", slot.tensor)
    inventory = Inventory.of(holder)
    inventory = replace(inventory, slots=tuple(item._replace(fqn=row.fqn) for item in inventory.slots))
    alone = load.of_rows((row,), Subject(inventory, load.subject.recorder))
    apply(replace(alone, decisions=replace(alone.decisions, extra_state=())))
    value: torch.Tensor = holder.state_dict()["value"].contiguous()
    slot.tensor.data = torch.empty(0, dtype=value.dtype)
    return value
