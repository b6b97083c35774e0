"""Patterns found by the name find what holding every pattern against it finds, and are told apart by what they begin
with."""

import fnmatch
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import weightlift as wl
from weightlift.patterns import Patterns, prefixes

parts = st.lists(st.sampled_from(["a", "b", "ab", "", "*", "?", "[ab]", "[!a]", "[", "a*", "*b", "1"]), max_size=4)
names = st.lists(st.sampled_from(["a", "b", "ab", "", "1", "*", "["]), max_size=4).map(".".join)


@given(st.lists(parts.map(".".join), max_size=6), st.lists(names, max_size=3))
def test_they_find_what_holding_each_against_the_name_finds(patterns, wanted):
    found = Patterns({pattern: number for number, pattern in enumerate(patterns)})
    for name in wanted:
        assert found.matching(name) == [pattern for pattern in found if fnmatch.fnmatchcase(name, pattern)]
    matching = [pattern for pattern in found if any(fnmatch.fnmatchcase(name, pattern) for name in wanted)]
    assert found.first(wanted) == (matching[0] if matching else None)


@given(names)
def test_prefixes_are_those_that_the_name_is_a_part_of(name):
    cut = [name[:place] for place in range(len(name)) if name[place] == "."]
    assert list(dict.fromkeys(prefixes(name))) == list(dict.fromkeys([name, *reversed(cut), ""]))


def test_a_copy_finds_the_same():
    found = pickle.loads(pickle.dumps(Patterns({"a.*": 1})))
    assert found == {"a.*": 1} and found.first(["a.b"]) == "a.*" and found.first(["b.a"]) is None


class Net(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(count)])


def test_a_name_is_held_against_few_of_many_patterns(monkeypatch):
    """One for each of many layers, as mixed precision and splitting have it."""
    count = 300
    held = []
    translate = fnmatch.translate
    monkeypatch.setattr(fnmatch, "translate", lambda pattern: held.append(pattern) or translate(pattern))
    dtypes = {f"layers.{number}.*": torch.float64 if number % 2 else torch.float16 for number in range(count)}
    net = wl.load(lambda: Net(count), Net(count).state_dict(), dtype=dtypes)
    assert [net.layers[number].weight.dtype for number in (0, 1, 298, 299)] == [torch.float16, torch.float64] * 2
    assert len(held) == count  # each is compiled once: ``fnmatch`` itself forgets most of them again


def test_what_matches_nothing_is_told_of_the_first_only(caplog):
    count = 30
    state = Net(count).state_dict()
    for options in (
        {"dtype": {f"model.layers.{number}.*": torch.float64 for number in range(count)}},
        {"device_map": {f"model.layers.{number}": "cpu" for number in range(count)}},
    ):
        caplog.clear()
        wl.load(lambda: Net(count), state, **options)
        (text,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert text.count("model.layers.") == 20 and text.endswith("; and others")


@pytest.mark.timeout(120)
def test_a_map_of_many_modules():
    count = 20_000
    modules = nn.ModuleDict({str(number): nn.Module() for number in range(count)})
    for number in range(count):
        modules[str(number)].register_buffer("b", torch.zeros(()))
    mapped = {str(number): "cpu" for number in range(count)}
    assert len(wl.plan(modules, modules.state_dict(), device_map=mapped).report.loaded) == count
