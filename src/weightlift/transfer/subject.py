"""What a load works on: the module with its tapes, where values come from, and all that belongs to it as one record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightlift.checkpoint.entry import ShardFile
from weightlift.checkpoint.integrity import Digest
from weightlift.deferred.doubles import Change
from weightlift.deferred.inventory import Inventory, is_lazy, tensors_of
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.tape import Record
from weightlift.errors import Problem
from weightlift.options import LoadOptions
from weightlift.plan.records import Decisions, Row
from weightlift.transfer.trace import Trace
from weightlift.unstrided import shape_of

_Form = tuple[torch.dtype, tuple[int, ...] | None]  # None: uninitialised


@dataclass(frozen=True, slots=True)
class Subject:
    """The module that a plan was made for: its slots, and the tapes it was built with (None: it was built ordinarily).

    ``existing``: it is a user's, and was there before. ``post_hooks``: its ``load_state_dict`` post hooks are called.
    """

    inventory: Inventory
    recorder: Recorder | None
    existing: bool = False
    post_hooks: bool = True

    def record_of(self, tensor: torch.Tensor) -> Record | None:
        """The tape of a tensor, if it has one."""
        return None if self.recorder is None else self.recorder.record_of(tensor)

    def record_at(self, address: int) -> Record | None:
        """`record_of`, where ``address``, the tensor's `storage_address`, is known."""
        return None if self.recorder is None else self.recorder.record_at(address)

    def records(self) -> list[Record]:
        """The tapes of all parameters and buffers, each once."""
        found = (self.record_of(slot.tensor) for slot in self.inventory.slots if not is_lazy(slot.tensor))
        return list(dict.fromkeys(record for record in found if record is not None))


@dataclass(frozen=True, slots=True)
class Given:
    """A user's module as it was at some moment: by name each tensor, its shape and dtype."""

    module: nn.Module
    tensors: Mapping[str, tuple[torch.Tensor, _Form]]

    @classmethod
    def of(cls, module: nn.Module) -> Given:
        """Look at a module now."""
        return cls(module, {fqn: (tensor, _form(tensor)) for fqn, tensor in tensors_of(module)})

    def changes(self) -> list[Problem]:
        """What is another one by now. Values may be: a plan does not depend on them."""
        now, problems = dict(tensors_of(self.module)), []
        for fqn, (tensor, was) in self.tensors.items():
            found = now.pop(fqn, None)
            if found is not tensor:
                problems.append(_stale(fqn, "is gone" if found is None else "is another tensor"))
            elif (form := _form(tensor)) != was:
                problems.append(_stale(fqn, "has changed", _described(was), _described(form)))
        return problems + [_stale(fqn, "is new") for fqn in now]


def _form(tensor: torch.Tensor) -> _Form:
    return tensor.dtype, None if is_lazy(tensor) else shape_of(tensor)


def _described(form: _Form) -> str:
    dtype, shape = form
    return "uninitialised" if shape is None else f"{list(shape)} of {dtype}"


def _stale(fqn: str, what: str, expected: str | None = None, found: str | None = None) -> Problem:
    what = f"{what} since the plan was made"
    return Problem(what, fqn=fqn, expected=expected, found=found, hint="make the plan again")


@dataclass(frozen=True, slots=True)
class Bytes:
    """Where values come from: files (with the hashes to check, if any), tensors in memory, values of extra state by
    name; and the ``changes`` that the module's state-dict hooks make to it.
    """

    files: tuple[ShardFile, ...]
    tensors: Mapping[str, torch.Tensor]
    extras: Mapping[str, Any]
    changes: tuple[Change, ...] = ()
    digests: Mapping[Path, Digest] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """One load that is ready to be carried out: what was decided, for which module, where the values are, and how it is
    to be done. ``trace`` is None where nobody asked for one.
    """

    decisions: Decisions
    subject: Subject
    source: Bytes
    options: LoadOptions
    trace: Trace | None = None

    def of_rows(self, rows: tuple[Row, ...], subject: Subject) -> Load:
        """The same for ``rows`` of ``subject`` alone, without what is done once for the whole: its checks, its bar."""
        return replace(
            self,
            decisions=replace(self.decisions, rows=rows, checks=()),
            subject=subject,
            options=replace(self.options, progress=False),
        )
