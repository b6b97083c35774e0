"""The plan as data: one row for every name of the module, the checks that need bytes, and what speaks against it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch

from weightlift.checkpoint.entry import ShardFile, TensorEntry
from weightlift.errors import Problem


class Action(str, enum.Enum):
    """What happens to one name of the module."""

    LOADED = "loaded"
    TIED = "tied"
    INITIALISED = "initialised"
    KEPT = "kept"
    MISMATCHED = "mismatched"

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of a checkpoint's tensor that go to one region of a destination.

    ``entry`` describes the wanted elements (its start, shape and stride, within ``key``'s bytes); its tensor in memory,
    if it has no file, is found under ``entry.key``. ``stride`` and ``offset`` give the region, of ``entry.shape``, in
    elements of the destination as if that were row-major. `weightlift.plan.parts` makes these.
    """

    key: str
    entry: TensorEntry
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Offer(NamedTuple):
    """What a checkpoint offers under a name of the module: ``key`` as the file has it, ``name`` after key mapping and
    state-dict hooks. With ``parts`` the value is made of these, and ``entry`` says its shape and dtype only.
    """

    name: str
    key: str
    entry: TensorEntry
    parts: tuple[Part, ...] = ()

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """What has to be read for it."""
        return tuple(part.entry for part in self.parts) if self.parts else (self.entry,)


class Row(NamedTuple):
    """One name of the module (``fqn``) and what is done with it.

    ``dtype`` and ``device`` are those of the result; ``own_dtype`` is what the module was built with. ``tied_to`` is
    the name that provides the value of a tied one, or of one that is mismatched itself. ``in_place``: the existing
    memory is filled, because other tensors share it; otherwise the tensor object gets new memory. ``target`` numbers
    the groups of names with one value.
    A loaded one has an ``offer``, or ``parts`` that fill it without overlap and without a hole; with both, ``parts``
    are what is read. ``missing``: it is persistent and nothing provides it; ``excused``: a state-dict hook says that
    this is meant. ``untied``: it gets a tensor object of its own, as its tie turned out not to hold. ``unstrided``: see
    `TensorSpec`.
    """

    fqn: str
    action: Action
    kind: str
    shape: tuple[int, ...]
    own_dtype: torch.dtype
    dtype: torch.dtype
    device: str
    target: int
    in_place: bool = False
    offer: Offer | None = None
    tied_to: str | None = None
    excused: bool = False
    parts: tuple[Part, ...] = ()
    missing: bool = False
    untied: bool = False
    unstrided: str = ""

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """What is read for it: nothing unless it is loaded."""
        if self.action is not Action.LOADED:
            return ()
        if self.parts:
            return tuple(part.entry for part in self.parts)
        return () if self.offer is None else self.offer.entries

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        count = self.dtype.itemsize
        for extent in self.shape:
            count *= extent
        return count

    @property
    def lacking(self) -> bool:
        """Missing, and not meant to be."""
        return self.missing and not self.excused

    @property
    def cast(self) -> bool:
        """True when a loaded value changes its dtype on the way."""
        return any(entry.dtype != self.dtype for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Check:
    """Two names of the same memory that are both in the checkpoint: only their bytes tell whether they can stay so.

    ``offer`` is that of ``fqn``, or its part that ``other_fqn`` is a view of. ``can_untie``: they can be given tensors
    of their own; names of one module, and views, cannot. ``lazily``: whether the one shows the conjugate, and the
    negative, of what the other shows.
    """

    fqn: str
    offer: Offer
    other_fqn: str
    other: Offer
    can_untie: bool = True
    lazily: tuple[bool, bool] = (False, False)


@dataclass(frozen=True, slots=True)
class Unexpected:
    """Something that the module has no place for: ``key`` as the file has it, ``name`` after key mapping; ``entry`` is
    None for what is no tensor, and for a name that a state-dict hook made up.
    """

    key: str
    name: str
    entry: TensorEntry | None = None


@dataclass(frozen=True, slots=True)
class Decisions:
    """Everything that was decided, frozen. `weightlift.LoadPlan` adds the module it was decided for.

    ``existing``: the module was there before. ``left_out`` is known only once a plan was executed: names whose value in
    the checkpoint is not used, each with the name of the same memory whose value is.
    ``hook_missing`` are names that a state-dict hook reports as missing, beside those of rows. The ``announced`` names
    are what post hooks are told.
    """

    module: str
    source: str
    rows: tuple[Row, ...]
    unexpected: tuple[Unexpected, ...]
    checks: tuple[Check, ...]
    problems: tuple[Problem, ...]
    files: tuple[ShardFile, ...]
    strict: bool
    missing_extra_state: tuple[str, ...] = ()
    early_keys: tuple[str, ...] = ()
    extra_state: tuple[str, ...] = ()
    existing: bool = False
    left_out: tuple[tuple[str, str], ...] = ()
    hook_missing: tuple[str, ...] = ()
    announced_missing: tuple[str, ...] = ()
    announced_unexpected: tuple[str, ...] = ()
