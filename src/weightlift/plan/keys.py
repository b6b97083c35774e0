"""From the keys of a checkpoint to the names of the module."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightlift.checkpoint.entry import TensorEntry
from weightlift.errors import Problem
from weightlift.options import KeyMapping
from weightlift.plan.heads import Names, has_whole_parts
from weightlift.plan.parts import part
from weightlift.plan.records import Offer, Part
from weightlift.plan.regions import narrow, whole

_MANY = 50  # patterns that are worth a look at the names first


@dataclass(frozen=True, slots=True)
class Renamed:
    """The names of keys; one that a callable drops has none. ``idle`` are patterns that match no key."""

    names: Mapping[str, str]
    idle: tuple[str, ...] = ()


def renamed(keys: Iterable[str], key_mapping: KeyMapping) -> Renamed:
    """Name the keys: every regular expression is applied in turn, a callable is asked once for each."""
    keys = list(keys)
    if isinstance(key_mapping, Mapping):
        return _by_patterns(keys, key_mapping)
    names: dict[str, str] = {}
    for key in keys:
        given = key_mapping(key)
        if given is None:
            continue
        if not isinstance(given, str):
            raise TypeError(f"key_mapping must give a string or None, found {given!r} for {key!r}")
        names[key] = given
    return Renamed(names)


def _by_patterns(keys: Sequence[str], key_mapping: Mapping[str, str]) -> Renamed:
    names, idle = list(keys), []
    known = Names(names) if sum(map(has_whole_parts, key_mapping)) >= _MANY else None
    for text, replacement in key_mapping.items():
        pattern = re.compile(text)
        places = range(len(names)) if known is None else known.matching(text)
        before = names if len(places) == len(names) else [names[place] for place in places]
        after = [pattern.sub(replacement, name) for name in before]
        # A name that does not match comes back as the same object, so that comparing costs next to nothing.
        if after == before:
            if keys and not any(map(pattern.search, before)):
                idle.append(text)
        elif known is None:
            names = after
        else:
            for number in itertools.compress(range(len(before)), map(operator.is_not, before, after)):
                names[places[number]] = after[number]
                known.add(places[number], after[number])
    return Renamed(dict(zip(keys, names, strict=True)), tuple(idle))


def offers_of(
    entries: Mapping[str, TensorEntry], names: Mapping[str, str] | None
) -> tuple[dict[str, Offer], list[Problem]]:
    """What is offered under which name; without ``names`` every key is its own. Two keys of one name are a problem."""
    if names is None:
        return {key: offer(key, key, entry) for key, entry in entries.items()}, []
    offers: dict[str, Offer] = {}
    problems = []
    for key, entry in entries.items():
        name = names.get(key)
        if name is None:
            continue
        if name in offers:
            problems.append(
                Problem(
                    f"key_mapping gives two keys the name {name}",
                    key=key,
                    file=entry.file,
                    found=f"{offers[name].key} has it already",
                    hint="make the mapping one to one, or let a callable drop a key by returning None",
                )
            )
        else:
            offers[name] = offer(name, key, entry)
    return offers, problems


def offer(name: str, key: str, entry: TensorEntry) -> Offer:
    """What is offered under a name by one entry, which may have chunks."""
    return Offer(name, key, entry, _parts(entry) if entry.chunks else ())


def _parts(entry: TensorEntry) -> tuple[Part, ...]:
    found = []
    for offsets, chunk in entry.chunks:
        region = whole(entry.shape)
        for dim, (offset, size) in enumerate(zip(offsets, chunk.shape, strict=True)):
            region = narrow(region, dim, offset, size)
        found.append(part(chunk, region))
    return tuple(found)


def extras_of(
    keys: Iterable[str], offers: Mapping[str, Offer], names: Mapping[str, str] | None
) -> tuple[dict[str, str], list[Problem]]:
    """Name → key of the values that are no tensors, under the rules that tensors are named by."""
    found: dict[str, str] = {}
    problems = []
    for key in keys:
        name = key if names is None else names.get(key)
        if name is None:
            continue
        first = offers[name].key if name in offers else found.get(name)
        if first is not None:
            what = f"key_mapping gives two keys the name {name}"
            problems.append(Problem(what, key=key, found=f"{first} has it already"))
        else:
            found[name] = key
    return found, problems


def metadata_of(
    metadata: Mapping[str, Mapping[str, object]] | None, pairs: Iterable[tuple[str, str]]
) -> Mapping[str, Mapping[str, object]] | None:
    """``_metadata`` of a state dict under the module names that follow from ``pairs`` (key, name)."""
    if metadata is None:
        return None
    prefixes: dict[str, str] = {}
    for key, name in pairs:
        old, new = key, name
        while old.rpartition(".")[2] == new.rpartition(".")[2] and (old or new):
            old, new = old.rpartition(".")[0], new.rpartition(".")[0]
            if old in prefixes:
                break
            prefixes[old] = new
    return {prefixes.get(prefix, prefix): item for prefix, item in metadata.items()}
