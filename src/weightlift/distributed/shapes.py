"""Running a ``parallelize`` function on a module of shapes.

``fully_shard`` copies the chunk it keeps, ``parallelize_module`` broadcasts and scatters. On the ``meta`` device torch
skips all of that and leaves DTensors that only say which part a rank holds. So for the time of the call every tensor of
the module gives way to a stand-in on ``meta``, of the dtype that was planned. What the function made of the
stand-ins is the `Home` of each name; the deferred tensors wait outside, unread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from weightlift.deferred.inventory import Inventory, Slot, is_lazy, storage_address
from weightlift.distributed.fsdp import has_fsdp
from weightlift.distributed.kept import Births
from weightlift.distributed.layout import Layout, splits_of
from weightlift.errors import PlanError, Problem
from weightlift.options import Parallelize
from weightlift.plan.records import Action, Row
from weightlift.strides import interval
from weightlift.unstrided import shape_of, unstrided

_log = logging.getLogger("weightlift")
_KEEP = (
    "parallelize may wrap modules, but not replace or copy them; what a rank does not keep is left out where the module"
    " is built"
)
_LOAD_FIRST = "load first and change the module afterwards, or leave this tensor out of parallelize"


@dataclass(frozen=True, slots=True)
class Home:
    """Where a name's value belongs.

    ``slot`` is where the module held it and the tensor that it held then. ``now`` is what that place holds after
    ``parallelize``: a DTensor, of which this rank fills the part that ``layout`` says, or (``layout`` None) the
    tensor of before, or one that ``parallelize`` gave a value. ``left`` is what it left in the place of the tensor of
    before: that gets its hooks in the end.
    """

    row: Row
    slot: Slot
    now: torch.Tensor
    layout: Layout | None = None
    left: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Homes:
    """A module after ``parallelize``. ``inventory`` has the names of before; ``device`` is that of the meshes."""

    module: nn.Module
    inventory: Inventory
    homes: tuple[Home, ...]
    device: torch.device | None


def is_dtensor(tensor: torch.Tensor) -> bool:
    """True for a DTensor, without importing torch.distributed for everything else."""
    return hasattr(tensor, "_spec") and hasattr(tensor, "device_mesh") and hasattr(tensor, "_local_tensor")


def settle(inventory: Inventory, rows: Sequence[Row], parallelize: Parallelize | None) -> Homes:
    """Call ``parallelize`` on the module as shapes, and find every name's home.

    ``parallelize`` takes the module and returns it, a wrapper of it, or None. Raises what it raises, and PlanError
    with every tensor whose part can't be told. The module is usable only once its homes are filled; see `put_back`.
    """
    stand_ins = _stand_ins(inventory, rows) if parallelize is not None else {}
    module, births = inventory.module, Births()
    if parallelize is not None:
        for slot in inventory.slots:
            if (stand_in := stand_ins.get(id(slot.tensor))) is not None:
                place(slot, stand_in)
        with births:
            returned = parallelize(module)
        module = _checked(returned, module)
        _tie_again(inventory, rows, module)
    homes: list[Home] = []
    problems: list[Problem] = []
    inside = {id(owner) for owner in Inventory.of(module).modules}
    fsdp = has_fsdp(module)
    for slot, row in zip(inventory.slots, rows, strict=True):
        try:
            homes.append(_home(slot, row, stand_ins.get(id(slot.tensor)), inside, births, fsdp=fsdp))
        except ValueError as error:
            what, hint = (*error.args, _LOAD_FIRST)[:2]
            problems.append(Problem(what, fqn=slot.fqn, hint=hint))
    problems += _views(homes)
    if problems:
        made = "parallelize made something of the module that" if parallelize is not None else "the module has what"
        raise PlanError(f"{made} can't be loaded", problems)
    meshes = [home.now.device_mesh for home in homes if home.layout is not None]  # type: ignore[attr-defined]
    return Homes(module, inventory, tuple(homes), device_of_mesh(meshes[0]) if meshes else None)


def _tie_again(inventory: Inventory, rows: Sequence[Row], module: nn.Module) -> None:
    """``parallelize_module`` replaces the parameters of one layer after the other, which unties them.

    They are tied again where both are placed alike. FSDP2 keeps ties, and holds on to what it has seen.
    """
    fsdp = has_fsdp(module)
    first: dict[int, tuple[Slot, Any]] = {}
    for slot, row in zip(inventory.slots, rows, strict=True):
        now: Any = slot.now()
        if now is None:
            continue
        owner, tied = first.setdefault(row.target, (slot, now))
        spread = is_dtensor(tied), is_dtensor(now)
        if tied is now or not any(spread):
            continue
        alike = all(spread) and tied._spec == now._spec and tied.requires_grad == now.requires_grad
        if alike and not fsdp and slot.kind == owner.kind:
            place(slot, tied)
        else:
            _log.warning("parallelize unties %s from %s: each gets memory of its own", slot.fqn, owner.fqn)


def _views(homes: Sequence[Home]) -> list[Problem]:
    """Tensors that are parts of another one's memory have no value of their own once that is sharded."""
    on_storage: dict[int, list[Home]] = {}
    for home in homes:
        if not is_lazy(home.slot.tensor) and (address := storage_address(home.slot.tensor)) >= 0:
            on_storage.setdefault(address, []).append(home)
    problems = []
    for members in on_storage.values():
        whole = max(members, key=lambda home: home.slot.tensor.nbytes)
        problems += [
            Problem(
                f"it is a view of {whole.row.fqn}, and parallelize shards one of them",
                fqn=home.row.fqn,
                hint="give it memory of its own in the constructor",
            )
            for home in members
            if home.row.target != whole.row.target and _loses(home, whole)
        ]
    return problems


def _loses(one: Home, other: Home) -> bool:
    """Whether a value that is loaded into two tensors' common memory would arrive in one of them only."""
    loaded = Action.LOADED in (one.row.action, other.row.action) or other.row.fqn == one.row.tied_to
    if not loaded or (one.layout is None and other.layout is None):
        return False
    (first, last), (start, end) = (_bytes_of(home.slot.tensor) for home in (one, other))
    return first < end and start < last


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Where in its storage a tensor begins and ends."""
    start, end = interval(tensor.shape, tensor.stride(), int(tensor.storage_offset()))
    return start * tensor.element_size(), end * tensor.element_size()


@contextlib.contextmanager
def put_back(inventory: Inventory) -> Iterator[None]:
    """Around all that changes a module: where it fails, the module has the tensors that it has now."""
    before = [(slot, slot.now()) for slot in inventory.slots]
    try:
        yield
    except BaseException:
        for slot, tensor in before:
            if tensor is not None and slot.now() is not tensor:
                place(slot, tensor)
        raise


def settled_again(homes: Homes) -> None:
    """Put what ``parallelize`` made in its places again, where `put_back` has undone it."""
    for home in homes.homes:
        if home.slot.now() is not home.now:
            place(home.slot, home.now)


def filled(homes: Homes) -> Homes:
    """A module whose homes have their values, to be filled once more."""
    now = [(home, tensor) for home in homes.homes if (tensor := home.slot.now()) is not None]
    found = tuple(replace(home, slot=home.slot._replace(tensor=tensor), now=tensor, left=None) for home, tensor in now)
    return replace(homes, inventory=replace(homes.inventory, slots=tuple(home.slot for home in found)), homes=found)


def place(slot: Slot, tensor: torch.Tensor) -> None:
    """Put a tensor in a slot; modules with a ``__setattr__`` of their own (recurrent ones keep lists) hear of it."""
    if type(slot.owner).__setattr__ is nn.Module.__setattr__:
        slot.put(tensor)
    else:
        setattr(slot.owner, slot.attribute, tensor)


def device_of_mesh(mesh: Any) -> torch.device:
    """The device that this rank's part of a mesh lies on."""
    kind = mesh.device_type
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


def layout_of(tensor: Any) -> Layout | None:
    """This rank's part of a DTensor; None when the rank is not of its mesh. Raises ValueError for ``Partial``."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    shape = tuple(tensor.shape)
    return Layout(shape, tuple(splits_of(tensor.placements, tuple(mesh.shape), coordinate, len(shape))))


def _checked(returned: Any, module: nn.Module) -> nn.Module:
    if returned is None:
        return module
    if not isinstance(returned, nn.Module):
        raise TypeError(f"parallelize must return a module or None, found {type(returned).__qualname__}")
    return returned


def _stand_ins(inventory: Inventory, rows: Sequence[Row]) -> dict[int, torch.Tensor]:
    """By the id of a tensor, its stand-in; names with one value share one, so that ties stay ties, unless only one of
    them is frozen."""
    made: dict[int, torch.Tensor] = {}
    by_value: dict[tuple[int, str, bool], torch.Tensor] = {}
    for slot, row in zip(inventory.slots, rows, strict=True):
        tensor = slot.tensor
        if id(tensor) in made or is_lazy(tensor) or is_dtensor(tensor) or unstrided(tensor):
            continue
        key = (row.target, slot.kind, tensor.requires_grad)
        if key not in by_value:
            by_value[key] = _stand_in(tensor, row.dtype)
        made[id(tensor)] = by_value[key]
    return made


def _stand_in(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    shape: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
    if not isinstance(tensor, nn.Parameter):
        return shape  # type: ignore[no-any-return]
    made: torch.Tensor = torch.Tensor._make_subclass(type(tensor), shape, tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    return made


def _home(
    slot: Slot, row: Row, stand_in: torch.Tensor | None, inside: set[int], births: Births, *, fsdp: bool
) -> Home:
    if id(slot.owner) not in inside:
        raise ValueError("its module is not part of what parallelize returned", _KEEP)
    now = slot.now()
    if now is None:
        raise ValueError("parallelize removed it")
    if is_lazy(now):
        raise ValueError("it has no shape yet")
    if now is slot.tensor and is_dtensor(now) and now.dtype != row.dtype:
        what = f"it is a DTensor of {now.dtype} already, which keeps its dtype, and is to be loaded as {row.dtype}"
        raise ValueError(what, "cast the module before, or leave dtype out")
    row = row._replace(dtype=now.dtype)
    if is_dtensor(now):
        return Home(row, slot, now, _checked_layout(now, row, fsdp=fsdp))
    if shape_of(now) != row.shape:
        raise ValueError(f"parallelize replaced it by a tensor of shape {list(now.shape)} that names no part of it")
    if stand_in is None or not (now is stand_in or now.is_meta or _is_computed(row, now, slot.tensor, births)):
        return Home(row, slot._replace(tensor=now), now)
    # Untouched, or changed as a tensor: frozen, cast, moved. The tensor of before takes its place again.
    place(slot, slot.tensor)
    return Home(row, slot, slot.tensor, left=now)


def _is_computed(row: Row, now: torch.Tensor, before: torch.Tensor, births: Births) -> bool:
    """Whether a tensor that ``parallelize`` put in a place gets what the constructor meant.

    So do parameters that the checkpoint lacks, as they do where they are sharded: what a rank samples for itself is
    not what the others do. Buffers keep a value that they were given.
    """
    if row.action in (Action.LOADED, Action.TIED) or type(now) is not type(before):
        return False
    return row.kind == "parameter" or not births.has_values(now)


def _checked_layout(tensor: Any, row: Row, *, fsdp: bool) -> Layout:
    layout = layout_of(tensor)
    if layout is None:
        return Layout((0,))  # a rank outside the mesh holds nothing
    layout = layout.as_fsdp_shards() if fsdp else layout
    found = tuple(tensor._local_tensor.shape)
    if layout.shape != row.shape:
        raise ValueError(f"parallelize gave it the shape {list(layout.shape)}, it was {list(row.shape)}")
    if layout.local_shape != found and not (0 in layout.local_shape and 0 in found):  # how nothing looks is torch's
        raise ValueError(f"its local shard has the shape {list(found)}, its placements say {list(layout.local_shape)}")
    return layout
