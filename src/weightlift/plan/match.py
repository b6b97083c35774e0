"""Matching a module's names with what a checkpoint offers: pure, records in, `Decisions` out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from weightlift.checkpoint.entry import ShardFile
from weightlift.deferred.inventory import ModuleSpec, TensorSpec
from weightlift.errors import Problem
from weightlift.options import LoadOptions
from weightlift.plan.overlap import overlays, share_memory
from weightlift.plan.placement import device_of, dtype_of
from weightlift.plan.problems import lacking, mismatched, unfillable, unfit, unplaced, without_value
from weightlift.plan.records import Action, Check, Decisions, Offer, Row, Unexpected
from weightlift.plan.remedies import in_short
from weightlift.strides import can_fill, has_overlap, is_expanded
from weightlift.unstrided import MKLDNN


@dataclass(frozen=True, slots=True)
class Supply:
    """What is there to load: the offers by name, and what the state-dict hooks of the module said about them.

    ``excused`` names are not missing although nothing offers them; ``extra_state`` are the extra-state names that the
    checkpoint holds, ``others`` the names (→ key) of other values that are no tensors; ``early_keys`` the keys that a
    hook had to see. Where hooks ran, ``unexpected`` is what torch finds unexpected, and ``hook_missing`` what it finds
    missing beside the names that have nothing; None and (): that is read off the names.
    """

    source: str
    offers: Mapping[str, Offer]
    files: tuple[ShardFile, ...]
    problems: tuple[Problem, ...] = ()
    excused: Collection[str] = frozenset()
    extra_state: Collection[str] = frozenset()
    early_keys: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    unexpected: tuple[Unexpected, ...] | None = None
    hook_missing: tuple[str, ...] = ()

    def saved_as(self) -> dict[str, str]:
        """By the names that a file leaves to another one, which they were tied to when it was saved, those others."""
        present = {offer.key: name for name, offer in self.offers.items()}
        told = (pair for file in self.files for pair in file.metadata.items())
        return {name: present[key] for name, key in told if key in present and name not in self.offers}

    def present(self) -> dict[str, str]:
        """Key → name of all that is offered."""
        others = {key: name for name, key in self.others.items()}
        return {**{offer.key: name for name, offer in self.offers.items()}, **others}


def match(spec: ModuleSpec, supply: Supply, options: LoadOptions, *, existing: bool = False) -> Decisions:
    """Decide what happens to every tensor of ``spec``. What speaks against the plan is in its problems, not raised.

    ``existing``: the module is a user's, so that what nothing provides keeps the value it has.
    """
    problems = list(supply.problems)
    rows, checks = _decided(spec.tensors, supply, options, existing, problems)
    unexpected = supply.unexpected
    if unexpected is None:
        unexpected = _unexpected(spec, supply)
    missing_extra = tuple(
        name for name in spec.extra_state if name not in supply.extra_state and name not in supply.excused
    )
    missing = [row for row in rows if row.lacking]
    if supply.hook_missing:
        tied = {row.fqn for row in rows if row.action is Action.TIED}
        supply = replace(supply, hook_missing=tuple(name for name in supply.hook_missing if name not in tied))
    if options.strict:
        lacks = lacking(missing, unexpected, supply.saved_as() if missing else {})
        lacks += [Problem("a state-dict hook reports it as missing", fqn=name) for name in supply.hook_missing]
        lacks += [Problem("extra state is missing in the checkpoint", fqn=name) for name in missing_extra]
        computed = {item.fqn for item in spec.tensors if not item.persistent} if unexpected else set()
        extra = [(item, unplaced(item, computed=item.name in computed)) for item in unexpected]
        problems += in_short(lacks, extra, rows, supply.present, options.key_mapping)
    problems += without_value(spec, rows, options)
    return Decisions(
        module=spec.name,
        source=supply.source,
        rows=rows,
        unexpected=tuple(unexpected),
        checks=tuple(checks),
        problems=tuple(problems),
        files=supply.files,
        strict=options.strict,
        missing_extra_state=missing_extra,
        early_keys=supply.early_keys,
        extra_state=tuple(name for name in spec.extra_state if name in supply.extra_state),
        existing=existing,
        hook_missing=supply.hook_missing,
        announced_missing=(*(row.fqn for row in missing), *missing_extra, *supply.hook_missing),
        announced_unexpected=tuple(item.name for item in unexpected),
    )


def _decided(
    tensors: Sequence[TensorSpec], supply: Supply, options: LoadOptions, existing: bool, problems: list[Problem]
) -> tuple[tuple[Row, ...], list[Check]]:
    """A row for every tensor, in order, and the checks. Adds to ``problems`` what speaks against single values."""
    rows: dict[str, Row] = {}
    checks: list[Check] = []
    target = 0
    shared = _shared_storages(tensors)
    for item in tensors:
        group = shared.get(item.storage)
        if group is None:
            if (row := _simple(item, target, supply, options)) is not None:
                rows[row.fqn] = row
                target += 1
                continue
            group = [item]
        elif item is not group[0]:
            continue
        ties = _tie_groups(group)
        covering = _covering(group, supply.offers)
        dtype, device = _shared_setting(ties, covering, supply.offers, options)
        over = overlays(ties, _fitting(ties, supply.offers), problems)
        for number, names in enumerate(ties):
            one = _Group(tuple(names), target, covering, over.get(number), dtype, device, existing, len(ties) > 1)
            _decide(one, supply, options, rows, checks, problems)
            target += 1
    return tuple(rows[item.fqn] for item in tensors), checks


def _simple(item: TensorSpec, target: int, supply: Supply, options: LoadOptions) -> Row | None:
    """The row of a tensor that is alone in its storage and offered in its shape, as nearly all are. None for others."""
    offer = supply.offers.get(item.fqn)
    if offer is None or not item.persistent or item.lazy or offer.entry.shape != item.shape:
        return None
    if item.unstrided or _folded(item):
        return None
    # By position, in the order of the fields: it takes half the time, and this is done for every tensor.
    return Row(
        item.fqn,
        Action.LOADED,
        item.kind,
        item.shape,
        item.dtype,
        dtype_of((item.fqn,), item.dtype, offer.entry.dtype, options.dtype),
        device_of(item.fqn, item.device, options),
        target,
        item.in_place,
        offer,
        None,
        item.fqn in supply.excused,
        offer.parts,
    )


def _folded(item: TensorSpec) -> bool:
    """Whether a tensor that has to be filled in place is expanded: torch writes to none that is."""
    return item.in_place and is_expanded(item.shape, item.stride)


def _unexpected(spec: ModuleSpec, supply: Supply) -> tuple[Unexpected, ...]:
    wanted = {item.fqn for item in spec.tensors if item.persistent}.union(spec.extra_state)
    found = [Unexpected(offer.key, name, offer.entry) for name, offer in supply.offers.items() if name not in wanted]
    found += [Unexpected(key, name) for name, key in supply.others.items() if name not in wanted]
    # What belongs to a child that is None (a head that was taken off) is left alone, as torch does it.
    return tuple([item for item in found if not item.name.startswith(spec.empty)] if spec.empty else found)


def _shared_storages(tensors: Sequence[TensorSpec]) -> dict[int, list[TensorSpec]]:
    """The names on every storage that has more than one."""
    first: dict[int, TensorSpec] = {}
    shared: dict[int, list[TensorSpec]] = {}
    for item in tensors:
        if (before := first.setdefault(item.storage, item)) is not item:
            shared.setdefault(item.storage, [before]).append(item)
    return shared


def _tie_groups(group: list[TensorSpec]) -> list[list[TensorSpec]]:
    """Names that stand for one value: the same tensor object, or tensors that are the same view of one storage."""
    if len(group) == 1:
        return [group]
    ties: dict[object, list[TensorSpec]] = defaultdict(list)
    for item in group:
        ties[(item.offset, item.shape, item.stride, item.dtype, item.lazily)].append(item)
    return list(ties.values())


def _covering(group: list[TensorSpec], offers: Mapping[str, Offer]) -> TensorSpec | None:
    """An offered name whose tensor is the whole storage: with it, every view of that storage has its values."""
    if len(group) == 1:
        return None
    for item in group:
        offer = offers.get(item.fqn)
        whole = item.nbytes == item.storage_bytes and not has_overlap(item.shape, item.stride)
        if item.persistent and offer is not None and whole and _fits(item, offer):
            return item
    return None


def _fits(item: TensorSpec, offer: Offer) -> bool:
    return item.lazy or can_fill(offer.entry.shape, item.shape)


def _fitting(ties: Sequence[Sequence[TensorSpec]], offers: Mapping[str, Offer]) -> dict[int, tuple[TensorSpec, Offer]]:
    """For each group of tied names the first that is offered and fits."""
    found: dict[int, tuple[TensorSpec, Offer]] = {}
    for number, names in enumerate(ties):
        for item in names:
            offer = offers.get(item.fqn) if item.persistent else None
            if offer is not None and _fits(item, offer):
                found[number] = item, offer
                break
    return found


def _shared_setting(
    ties: Sequence[Sequence[TensorSpec]],
    covering: TensorSpec | None,
    offers: Mapping[str, Offer],
    options: LoadOptions,
) -> tuple[torch.dtype | None, str | None]:
    """The one dtype and device of tensors that overlap in memory; None where each is asked for itself."""
    first = ties[0][0]
    if not share_memory([names[0] for names in ties]) or any(names[0].dtype != first.dtype for names in ties):
        return None, None
    offered = [offer for _, offer in _fitting(ties, offers).values()]
    source = offers[covering.fqn] if covering is not None else offered[0] if offered else None
    fqns = [item.fqn for names in ties for item in names]
    dtype = dtype_of(fqns, first.dtype, source.entry.dtype if source else None, options.dtype)
    return dtype, device_of(first.fqn, first.device, options)


@dataclass(frozen=True, slots=True)
class _Group:
    """Names with one value, and what their storage says about it: a name that provides for the whole storage, the
    offer of a tensor that they are a view of (``over``), one dtype and device for all that overlap. ``shares``: it has
    other names' tensors too."""

    names: tuple[TensorSpec, ...]
    target: int
    covering: TensorSpec | None
    over: tuple[TensorSpec, Offer] | None
    dtype: torch.dtype | None
    device: str | None
    existing: bool
    shares: bool


def _decide(
    group: _Group,
    supply: Supply,
    options: LoadOptions,
    rows: dict[str, Row],
    checks: list[Check],
    problems: list[Problem],
) -> None:
    """Decide one value and write a row for each of its names."""
    names = group.names
    wanted = [item for item in names if item.persistent and not item.unstrided]
    refused = {item.fqn for item in names if item.unstrided and item.persistent and item.fqn in supply.offers}
    problems += [unfillable(item, supply.offers[item.fqn]) for item in names if item.fqn in refused]
    offered = [(item, supply.offers[item.fqn]) for item in wanted if item.fqn in supply.offers]
    fitting = [(item, offer) for item, offer in offered if _fits(item, offer)]
    misfits = {item.fqn: offer for item, offer in offered if not _fits(item, offer)}
    if not options.ignore_mismatched:
        problems += [mismatched(item, misfits[item.fqn]) for item in wanted if item.fqn in misfits]
    if group.over is not None:
        over, part = group.over
        checks += [
            Check(over.fqn, part, item.fqn, offer, can_untie=False, lazily=_between(over, item))
            for item, offer in fitting
        ]
        fitting = []
    owner = fitting[0] if fitting else None
    if owner is not None:
        checks += [
            Check(owner[0].fqn, owner[1], item.fqn, offer, can_untie=item.slot != owner[0].slot)
            for item, offer in fitting[1:]
        ]
    dtype, device = _setting(group, owner, options)
    stays = (dtype, device) == (names[0].dtype, names[0].device) or group.shares
    if owner is not None and stays and _folded(owner[0]):
        problems.append(unfit(*owner))
    provider = owner[0] if owner else group.over[0] if group.over else group.covering
    found = {item.fqn: offer.entry.shape for item, offer in fitting}
    for item in names:
        action, offer, tied_to = _action(item, group, owner, provider, misfits)
        rows[item.fqn] = Row(
            fqn=item.fqn,
            action=action,
            kind=item.kind,
            # A tied name that is offered has the shape of its own value, which it gets if it is untied.
            shape=found.get(item.fqn, owner[1].entry.shape) if item.lazy and owner is not None else item.shape,
            own_dtype=item.dtype,
            dtype=dtype,
            device=device,
            target=group.target,
            in_place=item.in_place,
            offer=offer,
            tied_to=tied_to,
            excused=item.fqn in supply.excused,
            parts=offer.parts if offer is not None and action is Action.LOADED else (),
            missing=item.persistent and action in (Action.INITIALISED, Action.KEPT) and item.fqn not in refused,
            unstrided=item.unstrided,
        )


def _setting(
    group: _Group, owner: tuple[TensorSpec, Offer] | None, options: LoadOptions
) -> tuple[torch.dtype, str]:
    """The dtype and device of one value, which ``owner`` offers."""
    first = group.names[0]
    if first.unstrided == MKLDNN:
        return first.dtype, first.device  # torch can neither cast nor move it
    source = owner[1].entry.dtype if owner else None
    dtype = group.dtype or dtype_of([item.fqn for item in group.names], first.dtype, source, options.dtype)
    return dtype, group.device or device_of(first.fqn, first.device, options)


def _between(one: TensorSpec, other: TensorSpec) -> tuple[bool, bool]:
    """What makes ``other`` of what ``one`` shows of the same memory: a conjugation, a negation, both or neither."""
    return one.lazily[0] != other.lazily[0], one.lazily[1] != other.lazily[1]


def _action(
    item: TensorSpec,
    group: _Group,
    owner: tuple[TensorSpec, Offer] | None,
    provider: TensorSpec | None,
    misfits: Mapping[str, Offer],
) -> tuple[Action, Offer | None, str | None]:
    """(what happens to one name, the offer that this concerns, the name that provides its value)."""
    if owner is not None and item.fqn == owner[0].fqn:
        return Action.LOADED, owner[1], None
    if item.fqn in misfits:
        return Action.MISMATCHED, misfits[item.fqn], None if provider is None else provider.fqn
    if provider is not None:
        return Action.TIED, None, provider.fqn
    if item.persistent and misfits:
        # Its value is that of the mismatched name; the checkpoint has it, only not in this shape.
        return Action.TIED, None, next(iter(misfits))
    return (Action.KEPT if group.existing or not item.persistent else Action.INITIALISED), None, None
