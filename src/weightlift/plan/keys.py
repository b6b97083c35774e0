"""From the keys of a checkpoint to the names of the module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from weightlift.checkpoint.entry import TensorEntry
from weightlift.errors import Problem
from weightlift.options import KeyMapping
from weightlift.plan.records import Offer


def offers_of(
    entries: Mapping[str, TensorEntry], key_mapping: KeyMapping | None
) -> tuple[dict[str, Offer], list[Problem]]:
    """Name every entry. Two keys that get one name are a problem; a callable that gives None drops the key."""
    if key_mapping is None:
        return {key: Offer(key, key, entry) for key, entry in entries.items()}, []
    offers: dict[str, Offer] = {}
    problems = []
    for key, name in renamed(entries, key_mapping):
        if name in offers:
            problems.append(
                Problem(
                    f"key_mapping gives two keys the name {name}",
                    key=key,
                    file=entries[key].file,
                    found=f"{offers[name].key} has it already",
                    hint="make the mapping one to one, or let a callable drop a key by returning None",
                )
            )
        else:
            offers[name] = Offer(name, key, entries[key])
    return offers, problems


def extras_of(
    keys: Iterable[str], offers: Mapping[str, Offer], key_mapping: KeyMapping | None
) -> tuple[dict[str, str], list[Problem]]:
    """Name → key of the values that are no tensors, under the rules that tensors are named by."""
    found: dict[str, str] = {}
    problems = []
    for key, name in renamed(keys, key_mapping):
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


def renamed(keys: Iterable[str], key_mapping: KeyMapping | None) -> list[tuple[str, str]]:
    """(key, name) of each key: every regular expression is applied in turn, a callable is asked once."""
    if key_mapping is None:
        return [(key, key) for key in keys]
    if isinstance(key_mapping, Mapping):
        rules = [(re.compile(pattern), replacement) for pattern, replacement in key_mapping.items()]
        pairs = []
        for key in keys:
            name = key
            for pattern, replacement in rules:
                name = pattern.sub(replacement, name)
            pairs.append((key, name))
        return pairs
    named: list[tuple[str, str]] = []
    for key in keys:
        given = key_mapping(key)
        if given is None:
            continue
        if not isinstance(given, str):
            raise TypeError(f"key_mapping must give a string or None, found {given!r} for {key!r}")
        named.append((key, given))
    return named
