"""What a module wants: its parameters and buffers as frozen records, and the slots they live in.

`ModuleSpec` is pure data, all that planning needs. `Inventory` is its other half and stays with the module: for each
record the tensor itself and the places (module, attribute) that hold it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from weightlift.deferred.tape import Record
from weightlift.lazy_views import shown
from weightlift.strides import has_overlap, row_major
from weightlift.unstrided import bytes_of, shape_of, unstrided

Kind = Literal["parameter", "buffer"]
_PLAIN = frozenset({torch.Tensor, nn.Parameter})
_storage_address: Callable[[torch.Tensor], int] = torch._C._storage_address  # type: ignore[attr-defined]


class TensorSpec(NamedTuple):
    """One name of a module's state. Names with the same ``tensor`` share one tensor object (a tie); names with the
    same ``storage`` but another ``tensor`` are views of the same memory. ``offset`` and ``stride`` count elements.
    Names with the same ``slot`` are one attribute of one module, which is known under several names.
    ``lazily``: whether what is shown is conjugated and negated beside what the memory holds (torch's lazy views).
    ``in_place``: the memory has to stay, because something outside these names uses it too, because it is the user's,
    or for its strides; ``lazy``: an uninitialised parameter, whose shape the checkpoint decides. ``unstrided``: what it
    is where it is no strided tensor ("sparse", "nested", "mkldnn"), which nothing is loaded into.
    """

    fqn: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    tensor: int
    storage: int
    offset: int
    stride: tuple[int, ...]
    storage_bytes: int
    persistent: bool
    lazy: bool = False
    in_place: bool = False
    slot: int = -1
    lazily: tuple[bool, bool] = (False, False)
    unstrided: str = ""

    @property
    def numel(self) -> int:
        """Elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """A module as data: its class, its tensors in ``state_dict`` order, the keys of its extra state, the prefixes of
    children that are None."""

    name: str
    tensors: tuple[TensorSpec, ...]
    extra_state: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()


class Slot(NamedTuple):
    """Where a name lives: ``owner._parameters[attribute]`` or ``owner._buffers[attribute]``."""

    fqn: str
    kind: Kind
    owner: nn.Module
    attribute: str
    tensor: torch.Tensor
    persistent: bool

    def put(self, tensor: torch.Tensor) -> None:
        """Replace the tensor object that this slot holds."""
        self._place()[self.attribute] = tensor

    def now(self) -> torch.Tensor | None:
        """What is there by now; None if that is gone."""
        place = self._place()  # of a TorchScript module no dictionary, and without its `get`
        if self.attribute not in place:
            return None
        found: torch.Tensor | None = place[self.attribute]
        return found

    def held(self) -> torch.Tensor:
        """What is there by now; ``tensor`` if that is gone."""
        found = self.now()
        return self.tensor if found is None else found

    def _place(self) -> dict[str, Any]:
        return self.owner._parameters if self.kind == "parameter" else self.owner._buffers


@dataclass(frozen=True, slots=True)
class Inventory:
    """A module with all its slots, names of shared modules and tensors repeated as ``state_dict`` repeats them.

    ``modules`` are all within it, and ``prefixes`` their names with a dot: not in pairs, each of which would be one
    more object for the collector. ``empty`` are the prefixes of children that are None.
    """

    module: nn.Module
    modules: tuple[nn.Module, ...]
    prefixes: tuple[str, ...]
    slots: tuple[Slot, ...]
    empty: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> Inventory:
        """Walk the module once, in ``state_dict`` order."""
        modules: list[nn.Module] = []
        prefixes: list[str] = []
        slots: list[Slot] = []
        empty: list[str] = []
        _walk(module, "", modules, prefixes, slots, empty)
        return cls(module, tuple(modules), tuple(prefixes), tuple(slots), tuple(empty))

    def renewed(self) -> Inventory:
        """The same slots with the tensors that they hold by now."""
        return replace(self, slots=tuple([slot._replace(tensor=slot.held()) for slot in self.slots]))

    @property
    def extra_state(self) -> tuple[str, ...]:
        """The keys of the modules' extra state."""
        named = zip(self.prefixes, self.modules)
        return tuple([f"{prefix}_extra_state" for prefix, module in named if has_extra_state(module)])

    def spec(self, record_at: Callable[[int], Record | None]) -> ModuleSpec:
        """The module as data. ``record_at`` (of a `storage_address`) knows memory that was born in the construction;
        all other is somebody else's too, and has to be filled in place."""
        addresses = [storage_address(slot.tensor) for slot in self.slots]
        users = users_of(self.slots, addresses)
        numbers: dict[int, int] = {}
        storages: dict[int, int] = {}
        places = self._places()
        devices: dict[torch.device, str] = {}
        # Of few different ones: every tuple that stays is one more for the collector.
        extents: dict[tuple[int, ...], tuple[int, ...]] = {}
        tensors = []
        for place, (fqn, kind, _, _, tensor, persistent), address in zip(places, self.slots, addresses):
            record = record_at(address)
            shape, offset, stride, storage_bytes = _geometry(tensor, address, record)
            device = devices.get(tensor.device) or devices.setdefault(tensor.device, str(tensor.device))
            lazy = address < 0 and is_lazy(tensor)
            other = unstrided(tensor) if address < 0 and not lazy else ""
            in_place = not (tensor.is_meta or other) and (
                record is None
                or users[address] > 1
                or has_other_users(tensor, address, users[address])
                or not (tensor.is_contiguous() or has_overlap(shape, stride))
            )
            tensors.append(
                # By position, which takes half the time, in the order of the fields.
                TensorSpec(
                    fqn,
                    kind,
                    extents.setdefault(shape, shape),
                    tensor.dtype,
                    device,
                    numbers.setdefault(id(tensor), len(numbers)),
                    storages.setdefault(address, len(storages)),
                    offset,
                    extents.setdefault(stride, stride),
                    storage_bytes,
                    persistent,
                    lazy,
                    in_place,
                    place,
                    shown(tensor) if address >= 0 else (False, False),
                    other,
                )
            )
        return ModuleSpec(type(self.module).__qualname__, tuple(tensors), self.extra_state, self.empty)

    def _places(self) -> Sequence[int]:
        """A number for every slot; the same for one that a module has under several of its names."""
        if len({id(module) for module in self.modules}) == len(self.modules):
            return range(len(self.slots))
        places: dict[tuple[int, str], int] = {}
        return [places.setdefault((id(slot.owner), slot.attribute), len(places)) for slot in self.slots]


def users_of(slots: Iterable[Slot], addresses: Iterable[int]) -> dict[int, int]:
    """How many tensor objects of ``slots`` lie at each of the ``addresses`` of their storages."""
    users: dict[int, int] = {}
    seen: set[int] = set()
    for slot, address in zip(slots, addresses):
        tensor = id(slot.tensor)
        if tensor not in seen:
            seen.add(tensor)
            users[address] = users.get(address, 0) + 1
    return users


def _geometry(
    tensor: torch.Tensor, address: int, record: Record | None
) -> tuple[tuple[int, ...], int, tuple[int, ...], int]:
    """Shape, offset and strides in elements, and the bytes of the storage.

    Tensors without a storage (uninitialised or sparse ones) count as alone in one, and have no strides to speak of.
    """
    if address < 0:
        if is_lazy(tensor):
            return (), 0, (), 0
        shape = shape_of(tensor)
        return shape, 0, row_major(shape), bytes_of(tensor)
    # Asking the storage makes a Python object of it, which stays.
    nbytes = tensor.untyped_storage().nbytes() if record is None else record.nbytes
    return tuple(tensor.shape), tensor.storage_offset(), tensor.stride(), nbytes  # type: ignore[return-value]


def has_other_users(tensor: torch.Tensor, address: int, holders: int) -> bool:
    """Whether anybody's tensors lie on a storage besides ``holders`` of ours. ``address``: by `storage_address`."""
    if address < 0 or torch._C._storage_Use_Count(address) <= holders:
        return False
    # A storage object of Python's counts too, whether or not somebody holds it; asking makes sure that there is one.
    return bool(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1 > holders)


def held_elsewhere(slots: Iterable[Slot]) -> set[int]:
    """The ids of buffers that somebody holds, as the objects that they are, besides ``slots`` and their modules.

    Parameters are none of these: who holds one has it cast with the module, as torch has it.
    """
    known: dict[int, int] = {}
    places: set[tuple[int, str]] = set()
    buffers = [slot for slot in slots if slot.kind == "buffer" and not isinstance(slot.tensor, nn.Parameter)]
    for slot in buffers:
        place = (id(slot.owner), slot.attribute)
        known[id(slot.tensor)] = known.get(id(slot.tensor), 0) + (1 if place in places else 2)
        places.add(place)
    return {id(slot.tensor) for slot in buffers if _references(slot) > _OWN_REFERENCES + known[id(slot.tensor)]}


def _references(slot: Slot) -> int:
    return sys.getrefcount(slot.tensor)


# What counting adds by itself, which differs between versions of Python.
_OWN_REFERENCES = _references(Slot("", "buffer", nn.Module(), "", torch.empty(0, device="cpu"), True)) - 1


def _walk(
    module: nn.Module,
    prefix: str,
    modules: list[nn.Module],
    prefixes: list[str],
    slots: list[Slot],
    empty: list[str],
) -> None:
    modules.append(module)
    prefixes.append(prefix)
    for name, parameter in _parameters_of(module, prefix).items():
        if parameter is not None:
            slots.append(Slot(prefix + name, "parameter", module, name, parameter, True))
    transient = module._non_persistent_buffers_set
    for name, buffer in module._buffers.items():
        if buffer is not None:
            slots.append(Slot(prefix + name, "buffer", module, name, buffer, name not in transient))
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{prefix}{name}.", modules, prefixes, slots, empty)
        else:
            empty.append(f"{prefix}{name}.")


def _parameters_of(module: nn.Module, prefix: str) -> dict[str, nn.Parameter | None]:
    try:
        return module._parameters
    except AttributeError:
        raise _without_init(module, prefix[:-1]) from None


def _without_init(module: nn.Module, fqn: str = "") -> TypeError:
    """For a module that ``nn.Module.__init__`` was never called for."""
    at = f" at {fqn}" if fqn else ""
    what = "is no whole module: its __init__ lacks super().__init__(), which comes before all else"
    return TypeError(f"the {type(module).__qualname__}{at} {what}")


def tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every name with its tensor, in ``state_dict`` order: `Inventory.of` where no more is asked."""
    found: list[tuple[str, torch.Tensor]] = []
    waiting = [("", module)]
    while waiting:
        prefix, owner = waiting.pop()
        for name, parameter in _parameters_of(owner, prefix).items():
            if parameter is not None:
                found.append((prefix + name, parameter))
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                found.append((prefix + name, buffer))
        if owner._modules:
            children = [(f"{prefix}{name}.", child) for name, child in owner._modules.items() if child is not None]
            waiting += reversed(children)
    return found


def held_by(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Every parameter and buffer of ``modules``, without a name and in no order, each once or more."""
    found: list[torch.Tensor | None] = []
    for owner in modules:
        if owner._parameters:
            found += owner._parameters.values()
        if owner._buffers:
            found += owner._buffers.values()
    return [tensor for tensor in found if tensor is not None]


def modules_of(module: nn.Module) -> list[nn.Module]:
    """A module and all within it, each once: ``module.modules()``, which is a generator within a generator a level."""
    found: dict[int, nn.Module] = {}  # by identity: a module may define equality, or not be hashable
    waiting = [module]
    while waiting:
        owner = waiting.pop()
        if id(owner) not in found:
            found[id(owner)] = owner
            try:
                waiting += [child for child in owner._modules.values() if child is not None]
            except AttributeError:
                raise _without_init(owner) from None
    return list(found.values())


def is_lazy(tensor: torch.Tensor) -> bool:
    """True for ``UninitializedParameter`` and ``UninitializedBuffer``, whose shape the checkpoint decides."""
    if type(tensor) in _PLAIN:
        return False
    return torch.nn.parameter.is_lazy(tensor)


def has_extra_state(module: nn.Module) -> bool:
    """True when ``load_state_dict`` would look for this module's ``_extra_state``."""
    return type(module).set_extra_state is not nn.Module.set_extra_state


def storage_address(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage object; a negative number of its own for a tensor without one.

    A nested tensor has one and no strides within it, so that it counts as without; one that is composed of others may
    have one, and its values lie elsewhere.
    """
    if is_lazy(tensor) or tensor.is_nested or (type(tensor) not in _PLAIN and unstrided(tensor)):
        return -id(tensor)
    try:
        return _storage_address(tensor)
    except (RuntimeError, NotImplementedError):
        return -id(tensor)
