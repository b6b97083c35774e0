"""What a checkpoint supplies to a module: its values under the module's names, after key mapping and state-dict hooks.

The one place where headers, tapes and names meet before anything is decided; `weightlift.plan.match` decides.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from weightlift.ambient import outside_modes
from weightlift.checkpoint import Checkpoint
from weightlift.checkpoint.memory import entry_of
from weightlift.deferred.construct import recording
from weightlift.deferred.doubles import Change
from weightlift.deferred.inventory import Inventory, ModuleSpec, TensorSpec
from weightlift.deferred.rewrite import forgiven, rewrite
from weightlift.deferred.rewritten import Refit, Rewritten, State
from weightlift.deferred.stand_ins import Offered
from weightlift.deferred.walk import has_post_hooks, is_bypassed
from weightlift.errors import Problem
from weightlift.options import LoadOptions
from weightlift.plan.idle import idle_patterns
from weightlift.plan.keys import extras_of, metadata_of, offers_of, renamed
from weightlift.plan.match import Supply, match
from weightlift.plan.records import Decisions, Offer, Unexpected
from weightlift.plan.regions import reshape
from weightlift.strides import row_major
from weightlift.transfer.subject import Bytes, Load, Subject

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")

_log = logging.getLogger("weightlift")
_SHOWN = 20
_INSTEAD = (
    ", though the class overrides it: what it changes belongs in _load_from_state_dict or a state-dict hook, which are"
    " run, or key_mapping; where it has to be called: module = wl.defer(build).materialize(),"
    " then module.load_state_dict(…)"
)


class _Made(Mapping[str, _Value], Generic[_Item, _Value]):
    """What a function makes of each value of a mapping, whenever it is asked for."""

    def __init__(self, items: Mapping[str, _Item], make: Callable[[_Item], _Value]) -> None:
        self._items = items
        self._make = make

    def __getitem__(self, name: str) -> _Value:
        return self._make(self._items[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def _called(maker: Callable[[], Any]) -> Any:
    return maker()


def decide(subject: Subject, checkpoint: Checkpoint, options: LoadOptions) -> Load:
    """Decide what a load does. Reads what state-dict hooks look at, nothing else; what they raise comes through."""
    for recorder in recording():  # within a constructor, whose tensors may have no values yet
        tensors = [*(slot.tensor for slot in subject.inventory.slots), *checkpoint.tensors.values()]
        recorder.give_up(tensors, "a load within the constructor")
    matching = _Matching(subject, checkpoint, options)
    decisions = matching.decisions()
    _warn(subject, checkpoint, options, matching.idle)
    if options.strict and decisions.problems and any(has_post_hooks(module) for module in subject.inventory.modules):
        decisions = matching.forgiven(decisions)
    if decisions.problems and is_bypassed(subject.inventory.module):
        decisions = _with_hint(decisions, f"{_not_called(subject.inventory.module)}{_INSTEAD}")
    source = Bytes(checkpoint.files, {**checkpoint.tensors, **matching.early}, matching.extras, matching.changes)
    return Load(decisions, replace(subject, inventory=matching.inventory), source, options)


def _not_called(module: nn.Module) -> str:
    return f"{type(module).__qualname__}.load_state_dict is not called"


def _with_hint(decisions: Decisions, text: str) -> Decisions:
    """Say something with the first problem, which every error shows: names may be what the override deals with."""
    first, *rest = decisions.problems
    first = replace(first, hint=text if first.hint is None else f"{first.hint}; {text}")
    return replace(decisions, problems=(first, *rest))


def _warn(subject: Subject, checkpoint: Checkpoint, options: LoadOptions, idle: tuple[str, ...]) -> None:
    """Say what a user may not have meant, and what speaks against no plan."""
    inventory = subject.inventory
    name = type(inventory.module).__qualname__
    if is_bypassed(inventory.module):
        _log.warning("%s into %s: %s%s", checkpoint.source, name, _not_called(inventory.module), _INSTEAD)
    if not idle and options.device_map is None and not isinstance(options.dtype, Mapping):
        return
    names = [slot.fqn for slot in inventory.slots]
    found = idle_patterns(options, idle, names, [prefix[:-1] for prefix in inventory.prefixes])
    texts = list(itertools.islice(found, _SHOWN))
    if texts and next(found, None) is not None:
        texts.append("and others")
    if texts:
        _log.warning("%s into %s: %s", checkpoint.source, name, "; ".join(texts))


class _Matching:
    """One matching of a subject's names with a checkpoint's.

    What it makes for later must not refer to it: a cycle would keep the module until the next collection.
    """

    def __init__(self, subject: Subject, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self._subject, self._checkpoint, self._options = subject, checkpoint, options
        names, self.idle = None, tuple[str, ...]()
        if options.key_mapping is not None:
            done = renamed((*checkpoint, *checkpoint.extras), options.key_mapping)
            names, self.idle = done.names, done.idle
        self._offers, self._problems = offers_of(checkpoint, names)
        self._others, clashes = extras_of(checkpoint.extras, self._offers, names)
        self._problems += clashes
        metadata = checkpoint.state_dict_metadata
        if names is not None:
            metadata = metadata_of(metadata, ((key, names[key]) for key in checkpoint if key in names))
        offers = self._offers
        self._state = State(
            tensors=_Made(offers, lambda offer: (offer.entry.shape, offer.entry.dtype)),
            read=lambda name: checkpoint.read(offers[name].key),
            extras=_Made({name: self._other(key) for name, key in self._others.items()}, _called),
            metadata=metadata,
        )
        self.inventory: Inventory = subject.inventory
        self.early: dict[str, torch.Tensor] = {}
        self.extras: Mapping[str, Any] = {}
        self.changes: tuple[Change, ...] = ()
        told = rewrite(subject.inventory, self._state, subject.recorder, options.seed)
        with outside_modes():
            # Memory that was not born in the construction is a user's, or an array's: it is filled, never replaced.
            plain = (subject.inventory if told is None else told.inventory).spec(subject.record_at)
            self._spec = plain if told is None else _refitted(plain, told.refits)
        self._supply = self._as_it_is() if told is None else self._after_hooks(told)

    def decisions(self) -> Decisions:
        return match(self._spec, self._supply, self._options, existing=self._subject.existing)

    def forgiven(self, refused: Decisions) -> Decisions:
        """What post hooks make of a plan that missing or unexpected names speak against: they may take names off."""
        if not refused.announced_missing and not refused.announced_unexpected:
            return refused
        missing, unexpected = forgiven(self._subject.inventory, self._state, self._subject.recorder, self._options.seed)
        supply, still = self._supply, set(missing)
        listed = supply.unexpected
        if listed is None:
            found = (Unexpected(offer.key, name, offer.entry) for name, offer in self._offers.items())
            others = (Unexpected(key, name) for name, key in self._others.items())
            listed = (*found, *others)
        left = set(unexpected)
        self._supply = replace(
            supply,
            excused={*supply.excused, *(name for name in refused.announced_missing if name not in still)},
            hook_missing=tuple(name for name in supply.hook_missing if name in still),
            unexpected=tuple(item for item in listed if item.name in left),
        )
        return replace(
            self.decisions(),
            announced_missing=refused.announced_missing,
            announced_unexpected=refused.announced_unexpected,
        )

    # -- without hooks ------------------------------------------------------------------------------------------------

    def _as_it_is(self) -> Supply:
        held = {item.fqn for item in self._spec.tensors if item.persistent}
        wrong = {name: key for name, key in self._others.items() if name in held}
        makers = {}
        for name in self._spec.extra_state:
            if name in self._offers:
                makers[name] = self._tensor(self._offers[name].key)
            elif name in self._others:
                makers[name] = self._other(self._others[name])
        self.extras = _Made(makers, _called)
        return Supply(
            source=self._checkpoint.source,
            offers=self._offers,
            files=self._checkpoint.files,
            problems=(*self._problems, *(self._no_tensor(name, key) for name, key in wrong.items())),
            excused=frozenset(wrong),
            extra_state=frozenset(makers),
            others=self._others,
        )

    def _no_tensor(self, fqn: str, key: str) -> Problem:
        if self._checkpoint.files or not isinstance(self._checkpoint.extras.get(key), torch.Tensor):
            return Problem("the checkpoint's value is no tensor", fqn=fqn, key=key, expected="a tensor")
        hint = "take the state_dict() of a lazy module after its first forward"
        return Problem("the checkpoint's value is uninitialised", fqn=fqn, key=key, expected="a tensor", hint=hint)

    def _other(self, key: str) -> Callable[[], Any]:
        extras = self._checkpoint.extras
        return lambda: extras[key]

    def _tensor(self, key: str) -> Callable[[], Any]:
        given, read = self._checkpoint.tensors, self._checkpoint.read
        return lambda: given[key] if key in given else read(key)

    # -- with hooks ---------------------------------------------------------------------------------------------------

    def _after_hooks(self, done: Rewritten) -> Supply:
        self.inventory, self.changes = done.inventory, done.changes
        final, early = dict[str, Offer](), list(done.early)
        computed = dict(done.values)
        for name, offered in done.names.items():
            offer = self._offer(name, offered)
            if offer is None:
                computed[name] = self._tensor(self._offers[offered.name].key)().reshape(offered.shape)
                early.append(offered.name)
            else:
                final[name] = offer
        for name, value in computed.items():
            key = f"{name} (computed by a state-dict hook)"
            self.early[key] = value
            final[name] = Offer(name, name, entry_of(key, value))
        self.extras = _Made({name: self._extra(value) for name, value in done.extras.items()}, _called)
        known = {item.fqn for item in self._spec.tensors if item.persistent} | set(self._spec.extra_state)
        problems = [Problem(f"a state-dict hook of the module reports: {text}") for text in done.errors]
        problems += [self._no_tensor(name, self._others.get(name, name)) for name in done.not_tensors]
        return Supply(
            source=self._checkpoint.source,
            offers=final,
            files=self._checkpoint.files,
            problems=(*self._problems, *problems),
            excused=frozenset(done.excused),
            extra_state=frozenset(done.extras),
            early_keys=tuple(dict.fromkeys(self._offers[name].key for name in early)),
            unexpected=tuple(self._unexpected(done.unexpected)),
            hook_missing=tuple(name for name in done.missing if name in final or name not in known),
        )

    def _offer(self, name: str, offered: Offered) -> Offer | None:
        """A value in the shape that hooks gave it; None where its strides allow that of a copy only."""
        before = self._offers[offered.name]
        entry = before.entry
        if entry.shape != offered.shape:
            if before.parts:
                return None
            reshaped = reshape(entry, offered.shape)
            if reshaped is None:
                return None
            entry = reshaped
        return Offer(name, before.key, entry, before.parts)

    def _extra(self, value: Any) -> Callable[[], Any]:
        """A maker of extra state in which nothing is left to be read."""
        makers = {name: self._tensor(self._offers[name].key) for name in _offered_in(value)}
        return lambda: _filled(value, makers)

    def _unexpected(self, names: Iterable[tuple[str, str | None]]) -> Iterator[Unexpected]:
        for name, before in names:
            if before in self._offers:
                offer = self._offers[before]
                yield Unexpected(offer.key, name, offer.entry)
            else:
                yield Unexpected(self._others.get(before or name, name), name)


def _offered_in(value: Any) -> Iterator[str]:
    if isinstance(value, Offered):
        yield value.name
    elif type(value) in (dict, list, tuple):
        for item in value.values() if type(value) is dict else value:
            yield from _offered_in(item)


def _filled(value: Any, makers: Mapping[str, Callable[[], Any]]) -> Any:
    if isinstance(value, Offered):
        return makers[value.name]().reshape(value.shape)
    if type(value) is dict:
        return {name: _filled(item, makers) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_filled(item, makers) for item in value)
    return value


def _refitted(spec: ModuleSpec, refits: Mapping[str, Refit]) -> ModuleSpec:
    """The spec with what the module's code made anew: tensors that are to get memory of their own."""
    if not refits:
        return spec
    first = 1 + max(item.storage for item in spec.tensors)
    groups = {group: first + number for number, group in enumerate(dict.fromkeys(it.group for it in refits.values()))}
    return replace(
        spec,
        tensors=tuple(
            _refit(item, refits[item.fqn], groups[refits[item.fqn].group]) if item.fqn in refits else item
            for item in spec.tensors
        ),
    )


def _refit(item: TensorSpec, refit: Refit, storage: int) -> TensorSpec:
    return item._replace(
        shape=refit.shape,
        dtype=refit.dtype,
        storage=storage,
        offset=0,
        stride=row_major(refit.shape),
        storage_bytes=math.prod(refit.shape) * refit.dtype.itemsize,
        lazy=False,
        in_place=False,
    )
