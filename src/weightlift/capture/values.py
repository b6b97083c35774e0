"""From what a module takes or returns to what is recorded, and back after edits. Plain code that dynamo can trace."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence

from weightlift.capture.checkpointing import unseen
from weightlift.capture.taps import Options, Output

_DEEP = 5  # as far as it is looked for tensors within an object


class Absent(LookupError):
    """An ``index`` that a value does not have; the text says what there is."""


class Lack(NamedTuple):
    """Stands for an element that is not there, or is None: ``found`` says what there is. Traced code can't raise."""

    found: str
    none: bool = False


class Recipe(NamedTuple):
    """What to do with a value: one tap's options, flat, as a traced function reads them."""

    index: Any
    part: Any
    replace: Callable[[Any], Any] | None
    calls: tuple[int, ...] | None  # those that ``replace`` edits; None: all
    detach: bool
    clone: bool | None
    target: dict[str, Any] | None


def recipe_of(tap: Options) -> Recipe:
    target = {key: value for key, value in (("device", tap.device), ("dtype", tap.dtype)) if value is not None}
    chosen = tap if isinstance(tap, Output) else None
    return Recipe(
        chosen.index if chosen else None,
        tap.part,
        chosen.replace if chosen else None,
        tuple(chosen.calls) if chosen and chosen.replace is not None and chosen.calls is not None else None,
        tap.detach,
        tap.clone,
        target or None,
    )


# A tensor that ``torch.vmap`` or ``torch.func.grad`` made of another. It does not count what is written to that.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def version_of(value: Any) -> Any:
    """What tells later whether somebody wrote to a value: see `written`. -1 where torch counts no writes."""
    if isinstance(value, torch.Tensor):
        while is_wrapped(value):
            value = torch._C._functorch.get_unwrapped(value)
        return -1 if value.is_inference() else value._version
    parts: list[tuple[Any, Any]] = []
    _parts_of(value, parts, {})
    return parts or -1


def written(value: Any, version: Any) -> bool:
    """Whether a value is no longer what it was when it had that version."""
    if isinstance(value, torch.Tensor):
        return bool(version >= 0 and version_of(value) != version)
    if version == -1:
        return False
    now: list[tuple[Any, Any]] = []
    _parts_of(value, now, {})
    return len(now) != len(version) or any(one is not two or m != n for (one, m), (two, n) in zip(now, version))


def _parts_of(value: Any, parts: list[tuple[Any, Any]], seen: dict[int, Any]) -> None:
    """What a container holds, and how often each tensor was written to. Its parts are kept: an id could come again."""
    items = items_of(value)
    if items is None or id(value) in seen:
        return
    seen[id(value)] = value
    for item in items:
        parts.append((item, version_of(item) if isinstance(item, torch.Tensor) else -1))
        _parts_of(item, parts, seen)


def items_of(value: Any) -> Sequence[Any] | None:
    """What a mapping, list, tuple or dataclass holds; None for anything else."""
    if isinstance(value, Mapping):
        return [*value.values()]
    if isinstance(value, list | tuple):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return None


def pick(value: Any, index: Any) -> Any:
    """The element ``index`` of an output: of a tuple, a mapping or an object. A `Lack` where there is none."""
    if index is None:
        return value
    if type(value) is tuple and type(index) is int and -len(value) <= index < len(value):  # the usual case, at once
        item = value[index]
    else:
        item = _element(value, index)
    if item is None:
        return Lack(f"None, in {kind_of(value)}", none=True)
    return item


def take(value: Any, index: Any) -> Any:
    """The element ``index``, which may be None. Raises `Absent`."""
    item = _element(value, index)
    if isinstance(item, Lack):
        raise Absent(item.found)
    return item


def _element(value: Any, index: Any) -> Any:
    if isinstance(index, int):
        items = value
        if isinstance(value, Mapping) and not hasattr(value, "to_tuple"):  # not one of Transformers' outputs
            items = tuple(value.values())
        elif not hasattr(value, "__getitem__") or not hasattr(value, "__len__") or isinstance(value, torch.Tensor):
            return Lack(f"{kind_of(value)}, which has no positions")
        try:
            return items[index] if -len(items) <= index < len(items) else Lack(kind_of(value))
        except (LookupError, TypeError):  # its places are no numbers
            return Lack(kind_of(value))
    if isinstance(index, str):
        if isinstance(value, Mapping):
            if index in value.keys():  # noqa: SIM118 - `in` may look through its rows
                return value[index]
            # Transformers' outputs have no key for a field that is None.
            return None if getattr(value, index, value) is None else Lack(kind_of(value))
        return getattr(value, index) if hasattr(value, index) else Lack(f"{kind_of(value)} without that attribute")
    if is_dynamo_compiling():
        return index(value)
    with unseen():
        return index(value)


def kind_of(value: Any) -> str:
    """What a message says of an output."""
    name = type(value).__name__
    if not isinstance(value, (Mapping, tuple, list)):
        return name
    keys = [str(key) for key, _ in value.items()] if isinstance(value, Mapping) else None
    count = len(value if keys is None else keys)
    text = f"{name} of {count} element{'' if count == 1 else 's'}"
    return text if keys is None else f"{text} ({', '.join(keys)})"


def put(value: Any, index: Any, new: Any) -> Any:
    """``value`` with its element ``index`` replaced, the original left as it was."""
    if index is None:
        return new
    if isinstance(value, tuple):
        items = list(value)
        items[_place(value, index)] = new
        return _tuple_of(value, items)
    if isinstance(value, list):
        items = list(value)
        items[index] = new
        return _list_of(value, items)
    if isinstance(value, Mapping):
        return _mapping_with(value, {list(value.keys())[index] if isinstance(index, int) else index: new})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass_with(value, {index: new})
    changed = copy.copy(value)
    setattr(changed, index, new)
    return changed


def _place(value: tuple[Any, ...], index: int | str) -> int:
    """Where an element of a tuple stands. Named tuples, and torch's own, as of ``torch.max``, have names for them."""
    return index if isinstance(index, int) else type(value).__match_args__.index(index)  # type: ignore[attr-defined]


def _tuple_of(value: tuple[Any, ...], items: Sequence[Any]) -> Any:
    """A tuple of the same kind."""
    kind: Any = type(value)
    if hasattr(value, "_fields"):
        return kind(*items)
    if kind is tuple or hasattr(value, "n_sequence_fields") or isinstance(value, torch.Size):
        return kind(items)
    changed = tuple.__new__(kind, items)  # whatever its constructor takes
    for name, item in getattr(value, "__dict__", {}).items():
        setattr(changed, name, item)
    return changed


def _list_of(value: list[Any], items: list[Any]) -> list[Any]:
    if type(value) is list:
        return items
    changed = copy.copy(value)
    changed[:] = items
    return changed


def _mapping_with(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same kind with other values for some keys."""
    if type(value) is not dict and not isinstance(value, MutableMapping):
        return type(value)({**value, **items})  # type: ignore[call-arg]
    changed = dict(value) if type(value) is dict else copy.copy(value)
    for key, item in items.items():
        changed[key] = item
    return changed


def _dataclass_with(value: Any, items: dict[str, Any]) -> Any:
    """A copy with other values of some fields. Nobody asks its constructor, which may want other things, or do more."""
    if is_dynamo_compiling() and not hasattr(value, "__dict__"):  # which can't trace the copying of slots
        return dataclasses.replace(value, **items)
    changed = copy.copy(value)
    for name, item in items.items():
        object.__setattr__(changed, name, item)  # it may be frozen
    return changed


def untouched(recipe: Recipe) -> bool:
    """Whether a value is recorded as it is."""
    return recipe.part is None and recipe.target is None and not (recipe.detach or recipe.clone)


def finish(value: Any, recipe: Recipe, within: tuple[Any, ...] = ()) -> Any:
    """The part, detached, moved and copied as asked; tensors within containers too. None stays None.

    ``within``: the containers around it. One that holds itself is left as it is there.
    """
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return _finish(value, recipe)
    if untouched(recipe) or _holds_itself(value, within):
        return value
    within = (*within, value)
    if isinstance(value, PackedSequence):  # what it holds beside the data says where its steps are
        moved = value.to(**recipe.target) if recipe.target else value
        return moved._replace(data=_finish(moved.data, recipe._replace(target=None)))
    if isinstance(value, tuple):
        return _tuple_of(value, [finish(item, recipe, within) for item in value])
    if isinstance(value, list):
        return _list_of(value, [finish(item, recipe, within) for item in value])
    if isinstance(value, Mapping):
        if not _can_be_made_anew(value):
            return value
        return _mapping_with(value, {key: finish(item, recipe, within) for key, item in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return _dataclass_with(value, {name: finish(getattr(value, name), recipe, within) for name in fields})
    return value


def beyond(value: Any, recipe: Recipe, within: tuple[Any, ...] = ()) -> str | None:
    """The kind of an object within a value whose tensors `finish` leaves as they are, and should not; else None."""
    if value is None or isinstance(value, torch.Tensor | str | int | float):
        return None
    items = items_of(value)
    if items is None:
        return type(value).__name__ if holds_tensors(value, recipe) else None
    if _holds_itself(value, within):
        return f"{type(value).__name__} within itself"
    if isinstance(value, Mapping) and not _can_be_made_anew(value):
        return type(value).__name__ if holds_tensors(value, recipe) else None
    kinds = [beyond(item, recipe, (*within, value)) for item in items]
    return next((kind for kind in kinds if kind is not None), None)


def reached(value: Any, recipe: Recipe) -> list[int | str]:
    """The elements of a value, as ``index`` names them, that hold tensors and nothing that is `beyond`."""
    items = items_of(value)
    if items is None:
        return []
    places: Sequence[Any] = range(len(items))
    if isinstance(value, Mapping):
        places = [*value.keys()]
    elif not isinstance(value, list | tuple):
        places = [field.name for field in dataclasses.fields(value)]
    fits = int if isinstance(value, list | tuple) else str
    return [
        place
        for place, item in zip(places, items)
        if isinstance(place, fits) and holds_tensors(item) and beyond(item, recipe) is None
    ]


def holds_tensors(value: Any, recipe: Recipe | None = None, deep: int = _DEEP) -> bool:
    """Also within what it holds, as a cache does, which has a list of layers; but a module's are no values.

    ``recipe``: only such as that would change.
    """
    if isinstance(value, torch.Tensor):
        return recipe is None or _changes(value, recipe)
    if deep == 0 or value is None or isinstance(value, str | int | float | type | nn.Module):
        return False
    held = items_of(value)
    if held is None:
        held = [*value] if isinstance(value, Set | deque) else [*getattr(value, "__dict__", {}).values()]
    return any(holds_tensors(item, recipe, deep - 1) for item in held)


def _changes(tensor: torch.Tensor, recipe: Recipe) -> bool:
    """Whether a tensor is not yet what the options ask for."""
    if recipe.part is not None or recipe.clone or (recipe.detach and tensor.requires_grad):
        return True
    target = _for(tensor, recipe.target or {})
    device = torch.device(target.get("device", tensor.device))
    elsewhere = device.type != tensor.device.type or device.index not in (None, tensor.device.index)
    return elsewhere or target.get("dtype", tensor.dtype) != tensor.dtype


def _can_be_made_anew(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping is one as Python has them, of which one with other values can be made. tensordict's are
    registered as mappings and go over their rows: what is right for such a one, only its class knows."""
    if type(value) is dict or is_dynamo_compiling():
        return True
    try:
        found, keys = list(value), list(value.keys())
        return (
            len(found) == len(keys)
            and all(one is other or (type(one) is type(other) and one == other) for one, other in zip(found, keys))
            and type(_mapping_with(value, dict(value))) is type(value)
        )
    except Exception:  # whatever its class raises, the forward is the user's
        return False


def _holds_itself(value: Any, within: tuple[Any, ...]) -> bool:
    return not is_dynamo_compiling() and any(value is outer for outer in within)


def _for(tensor: torch.Tensor, target: dict[str, Any]) -> dict[str, Any]:
    """What ``module.to`` would do to a tensor: masks and indices are moved, and not cast to a dtype of numbers."""
    if tensor.is_floating_point() or tensor.is_complex() or "dtype" not in target:
        return target
    wanted: torch.dtype = target["dtype"]
    if not (wanted.is_floating_point or wanted.is_complex):
        return target
    return {name: value for name, value in target.items() if name != "dtype"}


def _finish(tensor: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    moved = False
    if recipe.detach:
        tensor = tensor.detach()
    if recipe.part is not None:
        tensor = tensor[recipe.part]
    if recipe.target is not None:
        before = tensor
        tensor = tensor.to(**_for(tensor, recipe.target))
        moved = tensor is not before
    # A part that stays a view would keep the memory of the whole.
    if recipe.clone or (recipe.clone is None and recipe.part is not None and not moved):
        # Inductor may take a clone away, but not this.
        return torch.cat([tensor]) if is_dynamo_compiling() and tensor.dim() else tensor.clone()
    return tensor
