"""Matching a module's names with what a checkpoint offers: pure, records in, `Decisions` out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from weightlift.checkpoint.entry import ShardFile
from weightlift.deferred.inventory import ModuleSpec, TensorSpec
from weightlift.errors import Problem
from weightlift.options import LoadOptions
from weightlift.plan.nearest import nearest_names
from weightlift.plan.placement import device_of, dtype_of
from weightlift.plan.records import Action, Check, Decisions, Offer, Row


@dataclass(frozen=True, slots=True)
class Supply:
    """What is there to load: the offers by name, and what the state-dict hooks of the module said about them.

    ``excused`` names are not missing although nothing offers them; ``extra_state`` are the extra-state names that the
    checkpoint holds; ``early_keys`` the keys that a hook had to see.
    """

    source: str
    offers: Mapping[str, Offer]
    files: tuple[ShardFile, ...]
    problems: tuple[Problem, ...] = ()
    excused: Collection[str] = frozenset()
    extra_state: Collection[str] = frozenset()
    early_keys: tuple[str, ...] = ()


def match(spec: ModuleSpec, supply: Supply, options: LoadOptions) -> Decisions:
    """Decide what happens to every tensor of ``spec``. What speaks against the plan is in its problems, not raised."""
    rows: dict[str, Row] = {}
    checks: list[Check] = []
    problems = list(supply.problems)
    target = 0
    for group in _storage_groups(spec.tensors):
        covering = _covering(group, supply.offers)
        for names in _tie_groups(group):
            _decide(names, target, supply, options, covering, rows, checks, problems)
            target += 1
    ordered = tuple(rows[item.fqn] for item in spec.tensors)
    persistent = {item.fqn for item in spec.tensors if item.persistent}
    extra = set(spec.extra_state)
    unexpected = tuple(
        offer.key for name, offer in supply.offers.items() if name not in persistent and name not in extra
    )
    missing_extra = tuple(name for name in spec.extra_state if name not in supply.extra_state)
    if options.strict:
        problems += _missing_problems(ordered, supply, unexpected)
        problems += [Problem("extra state is missing in the checkpoint", fqn=name) for name in missing_extra]
        problems += _unexpected_problems(unexpected, supply, ordered)
    return Decisions(
        module=spec.name,
        source=supply.source,
        rows=ordered,
        unexpected_keys=unexpected,
        checks=tuple(checks),
        problems=tuple(problems),
        files=supply.files,
        strict=options.strict,
        missing_extra_state=missing_extra,
        early_keys=supply.early_keys,
        extra_state=tuple(name for name in spec.extra_state if name in supply.extra_state),
    )


def _storage_groups(tensors: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    groups: dict[int, list[TensorSpec]] = defaultdict(list)
    for item in tensors:
        groups[item.storage].append(item)
    return list(groups.values())


def _tie_groups(group: list[TensorSpec]) -> list[list[TensorSpec]]:
    """Names that stand for one value: the same tensor object, or tensors that are the same view of one storage."""
    if len(group) == 1:
        return [group]
    ties: dict[object, list[TensorSpec]] = defaultdict(list)
    for item in group:
        ties[(item.offset, item.shape, item.stride, item.dtype)].append(item)
    return list(ties.values())


def _covering(group: list[TensorSpec], offers: Mapping[str, Offer]) -> TensorSpec | None:
    """An offered name whose tensor is the whole storage: with it, every view of that storage has its values."""
    if len(group) == 1:
        return None
    for item in group:
        offer = offers.get(item.fqn)
        if item.persistent and offer is not None and item.nbytes == item.storage_bytes and _fits(item, offer):
            return item
    return None


def _fits(item: TensorSpec, offer: Offer) -> bool:
    # A one-element vector for a scalar: what torch itself accepts from checkpoints of version 0.3.
    return item.lazy or offer.entry.shape == item.shape or (item.shape == () and offer.entry.shape == (1,))


def _decide(
    names: list[TensorSpec],
    target: int,
    supply: Supply,
    options: LoadOptions,
    covering: TensorSpec | None,
    rows: dict[str, Row],
    checks: list[Check],
    problems: list[Problem],
) -> None:
    """Decide one value and write a row for each of its names."""
    wanted = [item for item in names if item.persistent]
    offered = [(item, supply.offers[item.fqn]) for item in wanted if item.fqn in supply.offers]
    fitting = [(item, offer) for item, offer in offered if _fits(item, offer)]
    misfits = {item.fqn: offer for item, offer in offered if not _fits(item, offer)}
    if not options.ignore_mismatched:
        problems += [_mismatch(item, misfits[item.fqn]) for item in wanted if item.fqn in misfits]
    owner = fitting[0] if fitting else None
    source_dtype = owner[1].entry.dtype if owner else None
    dtype = dtype_of([item.fqn for item in names], names[0].dtype, source_dtype, options.dtype)
    device = device_of(names[0].fqn, names[0].device, options)
    checks += [Check(owner[0].fqn, owner[1], item.fqn, offer) for item, offer in fitting[1:] if owner]
    for item in names:
        action, offer, tied_to = Action.INITIALISED, None, None
        if owner is not None and item.fqn == owner[0].fqn:
            action, offer = Action.LOADED, owner[1]
        elif item.fqn in misfits:
            action, offer = Action.MISMATCHED, misfits[item.fqn]
        elif owner is not None:
            action, offer, tied_to = Action.TIED, None, owner[0].fqn
        elif covering is not None:
            action, tied_to = Action.TIED, covering.fqn
        elif not item.persistent:
            action = Action.KEPT
        rows[item.fqn] = Row(
            fqn=item.fqn,
            action=action,
            kind=item.kind,
            shape=offer.entry.shape if item.lazy and offer is not None else item.shape,
            own_dtype=item.dtype,
            dtype=dtype,
            device=device,
            target=target,
            in_place=item.in_place,
            offer=offer,
            tied_to=tied_to,
            excused=item.fqn in supply.excused,
            parts=offer.parts if offer is not None and action is Action.LOADED else (),
        )


def _mismatch(item: TensorSpec, offer: Offer) -> Problem:
    entry = offer.entry
    return Problem(
        "the shapes differ",
        key=offer.key,
        fqn=item.fqn,
        file=entry.file,
        start=entry.start if entry.file else None,
        end=entry.end if entry.file else None,
        expected=f"{list(item.shape)} as the module has it",
        found=f"{list(entry.shape)} in the checkpoint",
        hint="build the module with the checkpoint's configuration, or pass ignore_mismatched=True to initialise it",
    )


def _missing_problems(rows: Sequence[Row], supply: Supply, unexpected: Sequence[str]) -> list[Problem]:
    problems = []
    for row in rows:
        if row.action is Action.INITIALISED and not row.excused:
            near = nearest_names(row.fqn, unexpected)
            problems.append(
                Problem(
                    f"the {row.kind} is missing in the checkpoint",
                    fqn=row.fqn,
                    expected=f"a tensor of shape {list(row.shape)}",
                    hint=(f"similar keys: {', '.join(near)}; " if near else "")
                    + "map names with key_mapping, or pass strict=False to initialise what is missing",
                )
            )
    return problems


def _unexpected_problems(unexpected: Sequence[str], supply: Supply, rows: Sequence[Row]) -> list[Problem]:
    if not unexpected:
        return []
    by_key = {offer.key: offer for offer in supply.offers.values()}
    problems = []
    for key in unexpected:
        entry = by_key[key].entry
        problems.append(
            Problem(
                "no tensor of the module has this name",
                key=key,
                file=entry.file,
                start=entry.start if entry.file else None,
                end=entry.end if entry.file else None,
                found=f"a tensor of shape {list(entry.shape)}",
                hint="map names with key_mapping, or pass strict=False to leave it out",
            )
        )
    return problems
