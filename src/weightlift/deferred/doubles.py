"""Doubles of modules, for running code of theirs that may write: the modules themselves are only looked at.

A double has its module's class and attributes. Parameters, buffers and other tensors are stand-ins, modules are
doubles, lists, dictionaries and sets are copies, and functions that hold any of these (bound methods, closures,
partials, hooks and their handles) are made anew around the doubles. Objects of other kinds are shared. What the doubled
code changed is found by comparing afterwards, as a list of `Change`.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from weightlift.deferred.stand_ins import StandIns

_WrappedHook: Any = torch.nn.modules.module._WrappedHook
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to do to a module so that it is as its double was left: an attribute of it or of one of its tensors,
    its class, or the contents of a container (then ``target`` is that and ``name`` None). ``gone``: the attribute was
    deleted.
    """

    target: Any
    name: str | None
    value: Any = None
    gone: bool = False

    def apply(self) -> None:
        """Do it. Writes into ``__dict__``: no ``__setattr__`` of the module's runs a second time."""
        if self.name is None:
            _refill(self.target, self.value)
        elif self.name == "__class__":
            self.target.__class__ = self.value
        elif self.name == "requires_grad" and isinstance(self.target, torch.Tensor):
            self.target.requires_grad_(self.value)
        elif self.gone:
            self.target.__dict__.pop(self.name, None)
        else:
            self.target.__dict__[self.name] = self.value


@dataclass(slots=True)
class _Pair:
    """Something and what stands for it; ``before`` is what that held at the beginning."""

    original: Any
    copy: Any
    before: Any


class Doubles:
    """The doubles of one rehearsal, made on demand, together with all that they refer to."""

    def __init__(self, stand_ins: StandIns, on_extra_state: Callable[[nn.Module, Any], None]) -> None:
        self._stand_ins = stand_ins
        self._on_extra_state = on_extra_state
        self._made: dict[int, tuple[Any, Any]] = {}  # id of an original → it and what stands for it
        self._originals: dict[int, Any] = {}  # id of what stands for something → the original
        self._as_they_are: dict[int, tuple[Any, ...]] = {}  # id of a tuple in which nothing is made anew → it
        self._unfinished = 0  # functions that are being made
        self._modules: list[_Pair] = []
        self._containers: list[_Pair] = []
        self._tensors: list[_Pair] = []
        self._slots: set[int] = set()  # ids of the doubles' ``_parameters`` and ``_buffers``
        self._marks: dict[int, object] = {}  # of tensors' stand-ins
        self._records: dict[int, object] = {}  # likewise
        self._loaded: Callable[[torch.Tensor], bool] = lambda tensor: False

    def of(self, module: nn.Module) -> nn.Module:
        """The double of a module, made now if there is none yet."""
        if id(module) in self._made:
            return self._made[id(module)][1]  # type: ignore[no-any-return]
        try:
            double: nn.Module = object.__new__(type(module))
        except TypeError:  # a class that is more than a Python object: it is shared
            return module
        self._remember(module, double)
        attributes = double.__dict__
        for name, value in module.__dict__.items():
            attributes[name] = self._map(value)
        # Extra state is for the module itself, once and at its time: here it is noted.
        if type(module).set_extra_state is not nn.Module.set_extra_state:
            attributes["set_extra_state"] = lambda state: self._on_extra_state(double, state)
        self._slots |= {id(attributes[name]) for name in ("_parameters", "_buffers")}
        self._modules.append(_Pair(module, double, dict(attributes)))
        return double

    def find(self, module: nn.Module) -> nn.Module:
        """The double of a module if there is one, else the module."""
        found = self._made.get(id(module))
        return module if found is None else found[1]

    def original(self, value: Any) -> Any:
        """What ``value`` stands for; itself if it stands for nothing."""
        return self._originals.get(id(value), value)

    def stands_in(self, value: Any) -> bool:
        """True for what was made here to stand for something."""
        return id(value) in self._originals

    def written(self, stand_in: torch.Tensor) -> bool:
        """True when a tensor is no longer the stand-in that it was made as."""
        return self._marks.get(id(stand_in)) != self._stand_ins.mark(stand_in)

    def moved(self, stand_in: torch.Tensor) -> bool:
        """True when a stand-in was given other memory than it was made with."""
        made = self._records[id(stand_in)]
        return made is not None and self._stand_ins.record_of(stand_in) is not made

    def _remember(self, original: Any, made: Any) -> None:
        self._made[id(original)] = original, made
        self._originals[id(made)] = original

    # -- from originals to doubles ------------------------------------------------------------------------------------

    def _map(self, value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        found = self._made.get(id(value))
        if found is not None:
            return found[1]
        if isinstance(value, nn.Module):
            return self.of(value) if "_parameters" in value.__dict__ else value
        if isinstance(value, torch.Tensor):
            made = self._stand_ins.own(value)
            self._remember(value, made)
            self._marks[id(made)] = self._stand_ins.mark(made)
            self._records[id(made)] = self._stand_ins.record_of(made)
            self._tensors.append(_Pair(value, made, (made.requires_grad, dict(made.__dict__))))
            return made
        if type(value) in _CONTAINERS:
            return self._map_container(value)
        if type(value) is tuple:
            return self._map_tuple(value)
        return self._map_callable(value)

    def _map_container(self, value: Any) -> Any:
        # `copy.copy` takes thirty times as long for an OrderedDict, of which each module has a dozen, nearly all empty.
        made = copy.copy(value) if getattr(value, "__dict__", None) else value.copy()
        self._remember(value, made)
        if isinstance(value, dict):
            for name, item in value.items():
                made[name] = self._map(item)
        elif not isinstance(value, set):
            for number, item in enumerate(value):
                made[number] = self._map(item)
        self._containers.append(_Pair(value, made, made.copy() if made else ()))
        return made

    def _map_tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if id(value) in self._as_they_are:
            return value
        made = tuple(self._map(item) for item in value)
        if all(new is old for new, old in zip(made, value)):
            if not self._unfinished:
                self._as_they_are[id(value)] = value  # there may be one large table that every module refers to
            return value
        self._remember(value, made)
        return made

    def _map_callable(self, value: Any) -> Any:
        """A function, hook or handle made anew around doubles; itself where there is nothing of theirs in it."""
        made = value
        if isinstance(value, types.MethodType):
            owner = self._map_held(value.__self__)
            made = value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        elif type(value) is _WrappedHook:
            made = copy.copy(value)
            made.hook = self._map_callable(value.hook)
            if value.with_module and (module := value.module()) is not None:
                made.module = weakref.ref(self._map_held(module))
        elif type(value) is functools.partial:
            arguments = [self._map_held(item) for item in value.args]
            named = {name: self._map_held(item) for name, item in value.keywords.items()}
            made = functools.partial(self._map_callable(value.func), *arguments, **named)
        elif type(value) is RemovableHandle:
            made = self._map_handle(value)
        elif type(value) is types.FunctionType and (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
            made = self._map_function(value)
        if made is not value:
            self._remember(value, made)
        return made

    def _map_held(self, value: Any) -> Any:
        """What a function holds: containers stay the ones that others see, too."""
        return value if type(value) in _CONTAINERS or type(value) is tuple else self._map(value)

    def _map_handle(self, handle: RemovableHandle) -> RemovableHandle:
        made = object.__new__(RemovableHandle)  # its own way of being copied writes to the class
        made.id = handle.id
        hooks = handle.hooks_dict_ref()
        made.hooks_dict_ref = weakref.ref(OrderedDict() if hooks is None else self._map(hooks))
        extra = [self._map(item) for ref in handle.extra_dict_ref if (item := ref()) is not None]
        made.extra_dict_ref = tuple(weakref.ref(item) for item in extra)
        return made

    def _map_function(self, function: types.FunctionType) -> types.FunctionType:
        cells = function.__closure__ or ()
        # A function may be in its own closure: it stands for itself until all that it holds is known.
        self._made[id(function)] = function, function
        self._unfinished += 1
        held = [content_of(cell) for cell in cells]
        mapped = [self._map_held(item) for item in held]
        defaults = function.__defaults__ and tuple(self._map_held(item) for item in function.__defaults__)
        given = function.__kwdefaults__ or {}
        named = {name: self._map_held(item) for name, item in given.items()}
        del self._made[id(function)]
        self._unfinished -= 1
        same = all(new is old for new, old in zip(mapped, held))
        same = same and all(new is old for new, old in zip(defaults or (), function.__defaults__ or ()))
        if same and all(given[name] is item for name, item in named.items()):
            return function
        closure = tuple(
            cell if new is old else types.CellType(new) for cell, new, old in zip(cells, mapped, held)
        )
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
        made.__kwdefaults__ = named or None
        made.__dict__.update(function.__dict__)
        return made

    # -- and back -----------------------------------------------------------------------------------------------------

    def changes(self, loaded: Callable[[torch.Tensor], bool] = lambda tensor: False) -> tuple[Change, ...]:
        """What has to be done to the originals so that they are as their doubles are now.

        ``loaded`` tells the tensors that lie in the memory of a parameter or buffer: they get their values with it.
        """
        self._loaded = loaded
        found: list[Change] = []
        for pair in self._modules:
            if type(pair.copy) is not type(pair.original):
                found.append(Change(pair.original, "__class__", type(pair.copy)))
            now = pair.copy.__dict__
            for name, value in now.items():
                if name not in pair.before or pair.before[name] is not value or self._is_written(value):
                    found.append(Change(pair.original, name, self.back(value)))
            found += [Change(pair.original, name, gone=True) for name in pair.before if name not in now]
        for pair in self._tensors:
            found += self._tensor_changes(pair)
        for pair in self._containers:
            if not pair.copy and not pair.before:
                continue
            written = id(pair.copy) not in self._slots and self._holds_written(pair.copy)
            if written or not _same_contents(pair.copy, pair.before):
                found.append(Change(pair.original, None, self._contents_back(pair.copy)))
        return tuple(found)

    def _tensor_changes(self, pair: _Pair) -> Iterator[Change]:
        """What was done to a tensor beside its values."""
        requires_grad, before = pair.before
        if pair.copy.requires_grad != requires_grad:
            yield Change(pair.original, "requires_grad", pair.copy.requires_grad)
        now = pair.copy.__dict__
        for name, value in now.items():
            if name not in before or before[name] is not value:
                yield Change(pair.original, name, self.back(value))
        for name in before:
            if name not in now:
                yield Change(pair.original, name, gone=True)

    def back(self, value: Any) -> Any:
        """What the module gets for ``value``: originals for what stands for them, tensors with values of their own."""
        if type(value) in _ATOMS:
            return value
        if isinstance(value, torch.Tensor):
            if self.stands_in(value) and not self._is_written(value):
                return self.original(value)
            return value if torch.nn.parameter.is_lazy(value) else self._kept(value)
        if self.stands_in(value):
            return self.original(value)
        if type(value) in _CONTAINERS:
            _refill(value, self._contents_back(value))
        elif type(value) is tuple:
            return tuple(self.back(item) for item in value)
        return value

    def _contents_back(self, value: Any) -> Any:
        """The contents of a container, each as the module gets it; slots keep their tensors, which are loaded later."""
        back = self.original if id(value) in self._slots else self.back
        if isinstance(value, dict):
            return {name: back(item) for name, item in value.items()}
        return [back(item) for item in value]

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        value = self._stand_ins.value(tensor, "an attribute set by a state-dict hook")
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value

    def _is_written(self, value: Any) -> bool:
        known = isinstance(value, torch.Tensor) and id(value) in self._marks
        return known and self.written(value) and not self._loaded(value)

    def _holds_written(self, value: Any) -> bool:
        items = value.values() if isinstance(value, dict) else value
        return any(self._is_written(item) for item in items)

    def dissolve(self) -> None:
        """Empty the doubles: they refer to each other, and their memory should not wait for a collector."""
        for pair in self._modules:
            pair.copy.__dict__.clear()
        self._modules.clear()
        self._containers.clear()
        self._tensors.clear()
        held: tuple[dict[int, Any], ...] = self._made, self._originals, self._marks, self._records, self._as_they_are
        for items in held:
            items.clear()


def content_of(cell: types.CellType) -> Any:
    """What a closure holds; None where nothing has been assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(contents)
    else:
        container.extend(contents)


def _same_contents(first: Any, second: Any) -> bool:
    if len(first) != len(second):
        return False
    if isinstance(first, dict):
        return all(a is b and first[a] is second[b] for a, b in zip(first, second))
    if isinstance(first, set):
        return bool(first == second)
    return all(a is b for a, b in zip(first, second))
