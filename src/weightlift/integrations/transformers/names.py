"""Transformers' own naming of keys, asked once for each form of a key instead of once for each key.

A checkpoint of a mixture of experts has tens of thousands of keys that differ in nothing but the numbers between their
dots (``model.layers.3.mlp.experts.17.up_proj.weight``). Where no rule can tell one such number from another, all keys
of one form are renamed alike: what the rules do is found out with two keys of that form, and filled in for the others.
`_blind_to_numbers` and `_chain` say when that is certain; every other key goes the way of Transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import core_model_loading as core

_NUMBER = re.compile(r"(?:(?<=\.)|^)([0-9]+)(?=\.|\Z)")
_DIGIT = re.compile("[0-9]")
_ZEROS = str.maketrans("123456789", "000000000")
# What may hold digits in a pattern and still takes all numbers alike: names of groups, the set of all digits, and the
# end of a literal name such as ``w1``, which a number between dots is never part of.
_GROUP_OR_ALL_DIGITS = re.compile(r"\(\?P<\w+>|\[0-9\]")
_SET = re.compile(r"\[[^]]*\]")
_NUMBERED_NAME = re.compile(r"(?<!\\)[A-Za-z_][0-9]+")
_Named = tuple[str, str | None]


def in_natural_order(keys: Iterable[str]) -> list[str]:
    """``sorted(keys, key=core.dot_natural_key)``, without a list and a tuple a part for every key.

    That function goes by the parts between dots, each by itself. Should it not (asked of every form of key), it is
    used as it is.
    """
    keys = list(keys)
    forms: dict[str, str] = {}
    parts: dict[str, Any] = {}
    for key in keys:
        forms.setdefault(key.translate(_ZEROS), key)
        parts.update(dict.fromkeys(key.split(".")))
    for part in parts:
        parts[part] = core.dot_natural_key(part)
    for key in forms.values():
        if core.dot_natural_key(key) != [one for part in key.split(".") for one in parts[part]]:
            return sorted(keys, key=core.dot_natural_key)
    # A part's rank among all parts, as a character: texts compare as the lists do, and cost the collector nothing.
    ranks: dict[str, str] = {}
    rank, before = 0, None
    for part in sorted(parts, key=parts.__getitem__):
        if parts[part] != before:
            rank, before = rank + 1, parts[part]
        if rank > 0x10FFFF:
            return sorted(keys, key=core.dot_natural_key)
        ranks[part] = chr(rank)
    return sorted(keys, key=lambda key: "".join([ranks[part] for part in key.split(".")]))


class Names:
    """``rename_source_key`` of one load. Not to be shared between threads."""

    def __init__(
        self, renamings: Sequence[Any], converters: Sequence[Any], prefix: str, expected: Mapping[str, Any]
    ) -> None:
        self._renamings, self._converters = renamings, converters
        self._prefix, self._expected = prefix, expected
        self._blind = all(_blind_to_numbers(item) for item in (*renamings, *converters))
        self._forms: dict[str, _Form | None] = {}
        self._completed: dict[str, str] = {}

    def of(self, key: str) -> _Named:
        """The model's name for a key, and the pattern of the converter that it is for."""
        name, pattern = self._renamed(key)
        if name not in self._expected and key in self._expected:
            return self._complete(key), None
        return name, pattern

    def _renamed(self, key: str) -> _Named:
        if self._blind:
            pieces = _NUMBER.split(key)
            zeros = _with_zeros(pieces)
            if zeros in self._forms:
                form = self._forms[zeros]
            else:
                form = self._forms[zeros] = _form(pieces, self._renamings, self._converters)
            if form is not None:
                return self._complete(form.fill(pieces)), form.pattern
        return self._asked(key, self._renamings, self._converters)

    def _complete(self, name: str) -> str:
        """The end of Transformers' renaming, which adds the base model's prefix or takes it away: by the names that
        there are, so it is asked for every name."""
        found = self._completed.get(name)
        if found is None:
            found = self._completed[name] = self._asked(name, [], [])[0]
        return found

    def _asked(self, key: str, renamings: Sequence[Any], converters: Sequence[Any]) -> _Named:
        found: _Named = core.rename_source_key(
            key, renamings, converters, base_model_prefix=self._prefix, meta_state_dict=self._expected
        )
        return found


class _Form:
    """What becomes of all keys of one form: texts, and which of the key's pieces stand between them."""

    __slots__ = ("_template", "pattern")

    def __init__(self, template: list[tuple[str, int]], pattern: str | None) -> None:
        self._template = template
        self.pattern = pattern

    def fill(self, pieces: Sequence[str]) -> str:
        """The name of the key that splits into ``pieces``."""
        return "".join([text if place < 0 else pieces[place] for text, place in self._template])


def _with_zeros(pieces: Sequence[str]) -> str:
    return "".join([piece if i % 2 == 0 else "0" * len(piece) for i, piece in enumerate(pieces)])


def _blind_to_numbers(item: Any) -> bool:
    """Whether a rule matches in the same places whatever the numbers between a key's dots are (of the same length), and
    its replacement brings none: no digit but where it is harmless, no reference to what a group has matched."""
    try:
        kind = type(item)
        for method in ("rename_source_key", "_scoped_match"):
            if getattr(kind, method) is not getattr(core.WeightTransform, method):
                return False
        pattern = _GROUP_OR_ALL_DIGITS.sub("", item.compiled_sources.pattern)
        scopes = f"{item.scope_prefix}{item.base_model_prefix}"
        replacement = item.target_patterns[0].replace(r"\1", "")
    except (AttributeError, IndexError):  # another version's rules
        return False
    if any(_DIGIT.search(found) for found in _SET.findall(pattern)):
        return False
    if any(text in pattern for text in ("(?P=", "(?(", r"\N{")):
        return False
    return not any(_DIGIT.search(_NUMBERED_NAME.sub("", text)) for text in (pattern, scopes, replacement))


def _form(pieces: Sequence[str], renamings: Sequence[Any], converters: Sequence[Any]) -> _Form | None:
    """How keys of the form of ``pieces`` (texts and numbers in turn) are renamed; None where that is not sure.

    Asked with numbers that all differ, so that the result shows which of them went where, and once more with others.
    """
    first, second = _distinct(pieces, 0), _distinct(pieces, 1)
    if first is None or second is None:
        return None
    found, again = (_chain("".join(asked), renamings, converters) for asked in (first, second))
    if found is None or again is None or found.pattern != again.pattern:
        return None
    # A number that lost its dots on the way could be read as part of a name by the next rule.
    if [_NUMBER.sub("", step) for step in found.steps] != [_NUMBER.sub("", step) for step in again.steps]:
        return None
    places = {first[place]: place for place in range(1, len(first), 2)}
    template = []
    for i, piece in enumerate(_NUMBER.split(found.steps[-1])):
        if i % 2 and piece not in places:
            return None
        template.append((piece, places[piece] if i % 2 else -1))
    form = _Form(template, found.pattern)
    return form if form.fill(second) == again.steps[-1] else None


def _distinct(pieces: Sequence[str], shift: int) -> list[str] | None:
    """``pieces`` with numbers of the same lengths that all differ; with another ``shift`` every one is another."""
    made = list(pieces)
    for place in range(1, len(pieces), 2):
        width = len(pieces[place])
        number = str(place // 2 + shift).zfill(width)
        if len(number) != width:
            return None
        made[place] = number
    return made


@dataclass(frozen=True, slots=True)
class _Chain:
    """The names that a key has had, itself first, and the pattern of the converter that took it."""

    steps: tuple[str, ...]
    pattern: str | None


def _chain(key: str, renamings: Sequence[Any], converters: Sequence[Any]) -> _Chain | None:
    """``rename_source_key`` step by step. None where a step might replace another place for other numbers.

    A rule replaces the first place in the key that reads like what it matched. That is the same place for all keys of
    a form if nothing before the match reads like it with all digits the same.
    """
    steps, pattern = [key], None
    for item in (*renamings, *converters):
        matched = item._scoped_match(steps[-1])
        if matched is None:
            continue
        _, text, match = matched
        if text.translate(_ZEROS).find(match.group(0).translate(_ZEROS)) != match.start():
            return None
        name, found = item.rename_source_key(steps[-1])
        steps.append(name)
        if any(item is converter for converter in converters):
            pattern = found
            break
    same = core.rename_source_key(key, renamings, converters) == (steps[-1], pattern)
    return _Chain(tuple(steps), pattern) if same else None
