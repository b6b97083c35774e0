"""What goes into a rehearsal of ``load_state_dict`` and what comes out: see `weightlift.deferred.rewrite`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from weightlift.deferred.doubles import Change
from weightlift.deferred.inventory import Inventory
from weightlift.deferred.stand_ins import Offered

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class Refit:
    """A slot whose tensor the module's code made anew or gave another shape or dtype; one ``group``, one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int


@dataclass(slots=True)
class Rewritten:
    """What the module's code did.

    ``inventory``: the module's slots as they will be. ``names``: fqn → the offered value that it gets. ``values``: fqn
    → one that a hook computed. ``refits``: fqn → the form of a tensor that was made anew. ``missing``: what torch would
    list as missing; ``unexpected`` likewise, with the offered name if it is one. ``excused``: names that have nothing
    and are not missed. ``early``: offered names whose values were looked at. ``errors``: what the code complained of.
    ``not_tensors``: fqn → what the state has in place of a tensor. ``extras``: extra-state name → its value.
    ``changes``: to the module itself, beside its tensors' values.
    """

    inventory: Inventory
    names: dict[str, Offered] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    refits: dict[str, Refit] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[tuple[str, str | None]] = field(default_factory=list)
    excused: set[str] = field(default_factory=set)
    early: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    not_tensors: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """What is offered: tensors (name → shape, dtype) and ``read`` to fetch one, other values, and ``_metadata``."""

    tensors: Shapes
    read: Callable[[str], torch.Tensor]
    extras: Mapping[str, Any]
    metadata: Mapping[str, Mapping[str, Any]] | None
