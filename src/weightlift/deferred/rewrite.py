"""What ``load_state_dict`` would make of a module and a checkpoint, found out without reading the one or touching the
other.

``load_state_dict`` lets a module rename, split and upgrade what it is given, fit itself to it, and forgive or complain:
pre-hooks, an overridden ``_load_from_state_dict``, ``_version``. Here the walk of ``load_state_dict`` is gone through
with stand-ins for the checkpoint's values and doubles for the modules that such code can get at and for all that these
refer to. A value that comes out under another name is a renaming and costs nothing; one that was computed, or looked
at, is read then and there.
"""

from __future__ import annotations

import contextlib
import gc
from collections import ChainMap, OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from weightlift.ambient import no_dispatch_modes
from weightlift.deferred.doubles import Doubles
from weightlift.deferred.filled import Filled
from weightlift.deferred.functions import FunctionRecorder
from weightlift.deferred.inventory import Inventory, Kind, Slot, has_extra_state, is_lazy, storage_address, users_of
from weightlift.deferred.reach import needs_double
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.replay import label_samples
from weightlift.deferred.rewritten import Refit, Rewritten, State
from weightlift.deferred.stand_ins import OWN, Offered, StandIns
from weightlift.deferred.tape import Record
from weightlift.deferred.walk import does_nothing, has_state_hooks, is_overridden, partition, slots_of, walk
from weightlift.strides import can_fill, is_expanded
from weightlift.unstrided import shape_of, unstrided

_IncompatibleKeys: Any = torch.nn.modules.module._IncompatibleKeys


def rewrite(inventory: Inventory, state: State, recorder: Recorder | None, seed: int) -> Rewritten | None:
    """Run the state-dict hooks of ``inventory.module`` on stand-ins and doubles; what a hook raises comes through.

    ``recorder`` is the one that the module was built under, if any: what hooks look at gets its values then. Returns
    None when no module has any that would do something, which is the common case and costs one look at each module.
    Must not be called with torch functions disabled.
    """
    named = zip(inventory.prefixes, inventory.modules)
    special = [(prefix, module) for prefix, module in named if has_state_hooks(module)]
    names = ChainMap[str, Any](state.tensors, state.extras)  # type: ignore[arg-type]
    if all(does_nothing(module, prefix, names, state.metadata or {}) for prefix, module in special):
        return None
    doubled = [module for _, module in special if needs_double(module)]
    with _Rehearsal(inventory, state, recorder, seed, doubled) as rehearsal:
        return rehearsal.outcome()


def forgiven(inventory: Inventory, state: State, recorder: Recorder | None, seed: int) -> tuple[list[str], list[str]]:
    """The names that are missing and unexpected once the post hooks, too, have been asked; on doubles again."""
    doubled = [module for module in inventory.modules if needs_double(module, post=True)]
    with _Rehearsal(inventory, state, recorder, seed, doubled, post=True) as rehearsal:
        return rehearsal.missing, rehearsal.unexpected


class _Rehearsal:
    """One walk of ``load_state_dict`` on stand-ins."""

    def __init__(
        self,
        inventory: Inventory,
        state: State,
        recorder: Recorder | None,
        seed: int,
        doubled: list[nn.Module],
        *,
        post: bool = False,
    ) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self._inventory = inventory
        self._given = state
        self._built_under = recorder
        self._recorder = Recorder(seed=seed) if recorder is None else recorder
        self._post = post
        self._special = doubled
        self._metadata = {name: dict(item) for name, item in (state.metadata or {}).items()}
        self._functions = FunctionRecorder(self._recorder)  # for the module's code alone: ours does without
        self._stand_ins = StandIns(self._recorder, state.read, self._settle_own)
        self._doubles = Doubles(self._stand_ins, self._note_extra_state)
        self._loads: dict[str, Offered | torch.Tensor] = {}
        self._origins: dict[str, str | None] = {}  # unexpected name → offered name
        self._states: list[dict[str, Any]] = []
        self._visited: tuple[nn.Module, str] | None = None
        self._result = Rewritten(inventory)
        self._filled = Filled(self._stand_ins)
        self._held: set[object] = set()  # memory of stand-ins for parameters and buffers
        self._groups: dict[object, int] = {}  # where tensors lie that were made anew
        self._born: set[Record] = set()

    # -- the scope ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> _Rehearsal:
        try:
            with _scope(self._recorder):
                self._walk()
        except BaseException:
            for state in self._states:
                state.clear()  # the traceback holds them, and what they offer need not be read for it
            self.__exit__()
            raise
        return self

    def _walk(self) -> None:
        self._born = set(self._recorder.records.values())
        self._label()
        self._double_modules()
        state: OrderedDict[str, Any] = OrderedDict(self._given.extras)
        for name, (shape, dtype) in self._given.tensors.items():
            state[name] = self._stand_ins.offered(name, shape, dtype)
        if self._given.metadata is not None:
            state._metadata = self._metadata  # type: ignore[attr-defined]
        self._states = [state]
        self._visit(self._doubles.find(self._inventory.module), "", state)

    def _double_modules(self) -> None:
        """Modules that code of theirs can get at, all that these refer to, and what shares memory with any of them."""
        more, slots = self._special, self._inventory.slots
        addresses = [storage_address(slot.tensor) for slot in slots]
        users = users_of(slots, addresses)
        self._stand_ins.shared = {address for address, count in users.items() if count > 1}
        while more:
            for module in more:
                self._doubles.of(module)
            alone = [self._doubles.find(slot.owner) is slot.owner for slot in slots]
            held = {address for address, is_alone in zip(addresses, alone) if not is_alone}
            found = zip(slots, addresses, alone)
            tied = [slot.owner for slot, address, is_alone in found if is_alone and address in held]
            more = [module for module in tied if self._doubles.of(module) is not module]

    def __exit__(self, *_: object) -> None:
        self._doubles.dissolve()
        self._stand_ins.dissolve()
        self._loads.clear()
        self._states.clear()
        self._give_values_to_what_is_left()
        self.__dict__.clear()  # its parts know it: a cycle, which would keep the module until the next collection

    def _label(self) -> None:
        """What a hook looks at has the value that it would have had anyway."""
        if self._built_under is not None:
            label_samples(dict.fromkeys(_records(self._inventory.slots, self._built_under)))

    def _settle_own(self, tensor: torch.Tensor) -> None:
        self._recorder.force_tensors([tensor], "a state-dict hook")

    # -- the walk -----------------------------------------------------------------------------------------------------

    def _visit(self, module: nn.Module, prefix: str, state: dict[str, Any]) -> None:
        """As in ``nn.Module.load_state_dict``: a module first, then its children, each on its part of the state."""
        if is_overridden(module):
            self._call_override(module, prefix, state)
        else:
            arguments = self._arguments(prefix, state)
            for hook in list(module._load_state_dict_pre_hooks.values()):
                with self._functions:
                    hook(*arguments)
            self._load(module, prefix, state)
        parts = partition(state, prefix, module)
        self._states += parts.values()
        for name, child in module._modules.items():
            if child is not None:
                self._visit(self._doubles.find(child), f"{prefix}{name}.", parts.get(name, {}))
        if self._post:
            for hook in list(module._load_state_dict_post_hooks.values()):
                with self._functions:
                    hook(module, _IncompatibleKeys(self.missing, self.unexpected))

    def _arguments(self, prefix: str, state: dict[str, Any]) -> tuple[Any, ...]:
        metadata = self._metadata.get(prefix[:-1], {})
        return state, prefix, metadata, True, self.missing, self.unexpected, self._result.errors

    def _load(self, module: nn.Module, prefix: str, state: dict[str, Any]) -> None:
        """What ``nn.Module._load_from_state_dict`` does after its hooks."""
        slots = slots_of(module)
        for name, _, tensor, persistent in slots:
            if not persistent:
                continue
            key = prefix + name
            if key not in state:
                self.missing.append(key)
            elif isinstance(state[key], torch.Tensor):
                self._load_one(module, key, tensor, state[key], prefix)
            else:
                self._result.not_tensors[key] = state[key]
        extra = prefix + "_extra_state"
        if has_extra_state(module):
            if extra in state:
                self._result.extras[extra] = state[extra]
            else:
                self.missing.append(extra)
        elif extra in state:
            self._note_unexpected(extra, state)
        names = {name for name, _, _, persistent in slots if persistent}
        for key in list(state):
            first, *rest = key[len(prefix) :].split(".", 1)
            ours = key.startswith(prefix) and key != extra  # a hook may have added what belongs elsewhere
            if ours and first not in (module._modules if rest else names):
                self._note_unexpected(key, state)

    def _load_one(self, module: nn.Module, key: str, tensor: torch.Tensor, value: torch.Tensor, prefix: str) -> None:
        lazy = is_lazy(tensor)
        if is_lazy(value):  # of a lazy module that has never run: as if it were not there, to one that has not, either
            if not lazy:
                self._result.not_tensors[key] = value
            return
        if not lazy and self._stand_ins.same_place(value, tensor) and not self._doubles.written(tensor):
            return  # it is given what it has
        self._loads[key] = self._settled(value, prefix)
        if lazy or not self._doubles.stands_in(module):
            return
        if _can_hold(tensor, value):
            tensor.copy_(value if value.shape == tensor.shape else value.reshape(tensor.shape))
            self._filled.note(key, tensor, offered=True)

    def _call_override(self, module: nn.Module, prefix: str, state: dict[str, Any]) -> None:
        """Call a module's own ``_load_from_state_dict`` on its double, and see what has been written."""
        before = {name: self._stand_ins.mark(tensor) for name, _, tensor, _ in slots_of(module)}
        known, count, missed = len(self._result.errors), len(self.unexpected), len(self.missing)
        self._visited = module, prefix
        with self._functions:
            module._load_from_state_dict(*self._arguments(prefix, state))
        self._visited = None
        for name in self.unexpected[count:]:
            self._note_origin(name, state)
        self._take_written(prefix, slots_of(module), before, state, missed, known)

    def _take_written(
        self,
        prefix: str,
        slots: list[tuple[str, Kind, torch.Tensor, bool]],
        before: dict[str, object],
        state: dict[str, Any],
        missed: int,
        known: int,
    ) -> None:
        """Note what an override gave to ``slots``, whose marks were ``before``. ``missed``, ``known``: how many names
        were missing, and how many complaints made, when it was called."""
        complaints = self._result.errors[known:]
        taken: set[object] = set()
        missing = {*self.missing[missed:]}
        # What is missing comes last: where it is tied to a name that was loaded, that one provides its value.
        for name, _, tensor, persistent in sorted(slots, key=lambda slot: prefix + slot[0] in missing):
            fqn, offered = prefix + name, state.get(prefix + name)
            if is_lazy(tensor) or (fqn in missing and self._stand_ins.memory(tensor) in taken):
                continue
            if name not in before or self._stand_ins.mark(tensor) != before[name]:
                self._take(fqn, tensor, prefix)
                taken.add(self._stand_ins.memory(tensor))
            elif persistent and isinstance(offered, torch.Tensor) and not _can_hold(tensor, offered):
                for text in [item for item in complaints if item.startswith(f"size mismatch for {fqn}:")]:
                    self._loads[fqn] = self._settled(offered, prefix)  # the plan reports it, or forgives
                    self._result.errors.remove(text)

    def _note_unexpected(self, name: str, state: dict[str, Any]) -> None:
        self.unexpected.append(name)
        self._note_origin(name, state)

    def _note_origin(self, name: str, state: dict[str, Any]) -> None:
        value = state.get(name)
        origin = self._stand_ins.origin(value) if isinstance(value, torch.Tensor) else None
        known = name in self._given.extras or name in self._given.tensors
        self._origins[name] = origin.name if isinstance(origin, Offered) else name if known else None

    def _note_extra_state(self, double: nn.Module, state: Any) -> None:
        if self._visited is not None and self._visited[0] is double:
            self._result.extras[f"{self._visited[1]}_extra_state"] = state

    # -- what tensors were given --------------------------------------------------------------------------------------

    def _take(self, fqn: str, tensor: torch.Tensor, prefix: str) -> None:
        """Note what a tensor of a double holds now."""
        origin = self._stand_ins.origin(tensor)
        if origin is OWN and self._doubles.stands_in(tensor) and not self._doubles.moved(tensor):
            return
        self._loads[fqn] = self._settled(tensor, prefix)
        self._filled.note(fqn, tensor, offered=isinstance(self._loads[fqn], Offered))

    def _settled(self, value: torch.Tensor, prefix: str) -> Offered | torch.Tensor:
        """An offered value under whatever name, or one that was computed, as it is at this moment."""
        origin = self._stand_ins.origin(value)
        if isinstance(origin, Offered):
            return origin
        return self._stand_ins.value(value, f"state-dict hook of {prefix[:-1] or 'the module'}")

    def _plain(self, value: Any) -> Any:
        """Extra state as the module gets it: an `Offered` in the place of a value that nobody looked at."""
        if isinstance(value, torch.Tensor):
            return self._settled(value, "")
        if type(value) in (dict, OrderedDict):
            return type(value)((name, self._plain(item)) for name, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._plain(item) for item in value)
        return value

    # -- the outcome --------------------------------------------------------------------------------------------------

    def outcome(self) -> Rewritten:
        """Everything that was found, free of stand-ins."""
        result = self._result
        with _scope(self._recorder):
            result.inventory = self._inventory_after()
            result.extras = {name: self._plain(value) for name, value in result.extras.items()}
            result.changes = self._doubles.changes(lambda tensor: self._stand_ins.memory(tensor) in self._held)
        for name, load in self._loads.items():
            if isinstance(load, Offered):
                result.names[name] = load
            else:
                result.values[name] = load
        result.missing = self.missing
        given = {*self._given.tensors, *self._given.extras}
        result.unexpected = [
            (name, self._origins.get(name, name if name in given else None)) for name in self.unexpected
        ]
        wanted = {slot.fqn for slot in result.inventory.slots if slot.persistent}.union(result.inventory.extra_state)
        result.excused = wanted - set(self._loads) - set(result.extras) - set(self.missing)
        result.early = self._stand_ins.early
        return result

    def _inventory_after(self) -> Inventory:
        slots: list[Slot] = []
        modules: list[nn.Module] = []
        prefixes: list[str] = []
        known = {id(module) for module in self._inventory.modules}
        found = list(walk(self._inventory.module, "", self._doubles.find))
        names = {prefix + name for prefix, module in found for name, *_ in slots_of(module)}
        provided = self._filled.provided(names)
        for prefix, module in found:
            original = self._doubles.original(module)
            modules.append(original)
            prefixes.append(prefix)
            for name, kind, tensor, persistent in slots_of(module):
                fqn = prefix + name
                if module is not original or id(module) not in known:
                    persistent = self._look_at(fqn, tensor, prefix, provided) or persistent
                slots.append(Slot(fqn, kind, original, name, self._doubles.original(tensor), persistent))
        return Inventory(self._inventory.module, tuple(modules), tuple(prefixes), tuple(slots))

    def _look_at(self, fqn: str, tensor: torch.Tensor, prefix: str, provided: set[object]) -> bool:
        """Note a slot of a double that is another than it was. True if it gets a value that was written into it.

        ``provided``: memory that was loaded under some name that is still there.
        """
        stands_in = self._doubles.stands_in(tensor)
        if stands_in and not is_lazy(tensor):
            self._held.add(self._stand_ins.memory(tensor))
        original = self._doubles.original(tensor)
        if is_lazy(tensor):
            return False
        kept = stands_in and (is_lazy(original) or (_alike(tensor, original) and not self._doubles.moved(tensor)))
        if kept and not self._doubles.written(tensor):
            return False
        unknown = fqn not in self._loads and self._stand_ins.memory(tensor) not in provided
        if unknown or self._filled.is_outdated(fqn, tensor):
            self._take(fqn, tensor, prefix)
        if not kept:
            place = self._groups.setdefault(self._stand_ins.place(tensor), len(self._groups))
            self._result.refits[fqn] = Refit(tuple(tensor.shape), tensor.dtype, place)
        return fqn in self._loads

    def _give_values_to_what_is_left(self) -> None:
        """Tensors of the rehearsal that somebody kept a hold of must not stay without their values."""
        if self._left():
            gc.collect()
            self._recorder.force(self._left(), "tensors kept by a state-dict hook")

    def _left(self) -> list[Any]:
        known = self._born.union(_records(self._result.inventory.slots, self._recorder))
        return [record for record in list(self._recorder.records.values()) if record.pending and record not in known]


@contextlib.contextmanager
def _scope(recorder: Recorder) -> Iterator[None]:
    """The modes of a rehearsal: what hooks do is recorded, and seen neither by the caller's modes nor by autograd."""
    with no_dispatch_modes(), torch.inference_mode(False), torch.no_grad(), recorder.resumed():
        yield


def _records(slots: Iterable[Slot], recorder: Recorder) -> list[Record]:
    found = (recorder.record_of(slot.tensor) for slot in slots if not is_lazy(slot.tensor))
    return [record for record in found if record is not None]


def _can_hold(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    if unstrided(tensor) or is_expanded(tensor.shape, tensor.stride()):
        return False  # the plan says what that means
    return can_fill(value.shape, tensor.shape)


def _alike(tensor: torch.Tensor, original: torch.Tensor) -> bool:
    return shape_of(tensor) == shape_of(original) and tensor.dtype == original.dtype
