"""Thousands of patterns: each tried where it may match, with the names that trying it on every key gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightlift.plan import keys as planned
from weightlift.plan.heads import Names
from weightlift.plan.keys import renamed


def one_by_one(keys: Sequence[str], mapping: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The names, and the patterns that no name matches, each tried on all."""
    names, idle = list(keys), []
    for text, replacement in mapping.items():
        if keys and not any(re.search(text, name) for name in names):
            idle.append(text)
        names = [re.sub(text, replacement, name) for name in names]
    return names, idle


def found(keys: Sequence[str], mapping: Mapping[str, str]) -> tuple[list[str], list[str]]:
    done = renamed(keys, mapping)
    return [done.names[key] for key in keys], list(done.idle)


WORDS = ["a", "b", "ab", "0", "10", "weight", "x-y", "_", "é", "B", ""]
names = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(".".join)
pieces = st.one_of(
    names.map(re.escape),
    names,
    st.sampled_from(["^", "$", r"\.", ".", r"\d+", "(a|b)", "[ab]", "*", "?", "{2}", "|", "(?:a|0)", "(?=b)", r"\b"]),
)


def is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


patterns = st.lists(pieces, min_size=1, max_size=4).map("".join).filter(is_pattern)
replacements = st.sampled_from(["", "a", "b.", ".0.", r"\g<0>", "new.", r"\\", "a.b.weight"])


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(names, unique=True, max_size=8), st.dictionaries(patterns, replacements, max_size=8))
def test_any_patterns_mean_what_they_mean_one_by_one(keys: list[str], mapping: dict[str, str]) -> None:
    few = planned._MANY
    planned._MANY = 0
    try:
        assert found(keys, mapping) == one_by_one(keys, mapping)
    finally:
        planned._MANY = few


def keys_of(layers: int) -> list[str]:
    return [f"h.{layer}.{part}.{kind}" for layer in range(layers) for part in "qkvo" for kind in ("weight", "bias")]


def test_one_takes_up_what_another_made() -> None:
    keys = keys_of(30)
    mapping = {f"^{re.escape(key)}$": f"first.{key}" for key in keys}
    mapping |= {re.escape(f"first.{key}"): f"second.{key}" for key in reversed(keys)}
    mapping |= {r"second\.h\.7\.": "h.7.", "^nothing$": "x", r"^h\.7\.q\.": "h.8.q.", r"h\.99\.q\.": ""}
    assert found(keys, mapping) == one_by_one(keys, mapping)
    assert renamed(keys, mapping).idle == ("^nothing$", r"h\.99\.q\.")


@pytest.mark.parametrize("form", ["^{}$", "^{}", "{}", "{}$"])
def test_few_names_are_tried(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(100)
    mapping = {form.format(re.escape(key)): "new." + key for key in keys}
    tried = 0
    matching = Names.matching

    def counted(self: Names, pattern: str) -> Sequence[int]:
        nonlocal tried
        places = matching(self, pattern)
        tried += len(places)
        return places

    monkeypatch.setattr(Names, "matching", counted)
    assert found(keys, mapping) == ([f"new.{key}" for key in keys], [])
    assert len(keys) <= tried <= 8 * len(keys)


@pytest.mark.parametrize("flags", ["(?i)", "(?x)"])
def test_flags_are_heeded(flags: str) -> None:
    keys = keys_of(3)
    mapping = {f"{flags}^H\\.1 \\.": "x.", f"{flags}H\\.{{1}}2\\.q": "y"}
    mapping |= {f"^{number}$": "z" for number in range(60)}
    assert found(keys, mapping) == one_by_one(keys, mapping)
