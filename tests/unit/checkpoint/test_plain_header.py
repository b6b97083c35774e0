"""The short way through a header accepts only what the rules accept, with the same entries; and what is written."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from weightlift.checkpoint import plain_header
from weightlift.checkpoint.safetensors import read_safetensors
from weightlift.errors import CheckpointError

INFO = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
GOOD = {"a": INFO, "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]}}
PIECES = [
    '"a"', '"b"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', '"U8"', '"F4"', '"F6_E2M3"', "0",
    "1", "-0", "1.0", "true", "null", "2", "3", "24", "25", "[", "]", "{", "}", "[[2]]", "{}", '"x"', "NaN", "1e400",
    ",", '"\\ud800"', "99999999999999999999999",
]  # fmt: skip


def write(path: Path, header: str, size: int = 25) -> Path:
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


def outcome(path: Path):
    try:
        found = read_safetensors(path)
    except CheckpointError as error:
        return str(error)
    return found


def both_ways(path: Path, monkeypatch: pytest.MonkeyPatch):
    short = outcome(path)
    with monkeypatch.context() as patch:
        patch.setattr("weightlift.checkpoint.safetensors.plain_entries", lambda *_: None)
        return short, outcome(path)


def test_what_is_written_goes_the_short_way(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"w": torch.zeros(2, 3), "ü": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"}))
    long = both_ways(path, monkeypatch)[1]
    monkeypatch.setattr("weightlift.checkpoint.safetensors._loads", lambda *_: pytest.fail("the long way"))
    assert read_safetensors(path) == long
    assert dict(read_safetensors(path).file.metadata) == {"format": "pt"}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [True, 6]}, {"shape": [6.0]}, {"shape": [-6]}, {"shape": [0]}, {"shape": [[6]]}, {"shape": "6"},
        {"dtype": ["F32"]}, {"dtype": "F4", "shape": [48]}, {"dtype": None}, {"data_offsets": [0.0, 24]},
        {"data_offsets": [False, 24]}, {"data_offsets": [1, 25]}, {"data_offsets": [0, 20]}, {"more": 1},
        {"shape": [6]}, {"shape": [2**70]},
    ],
)  # fmt: skip
def test_both_ways_say_the_same(tmp_path, monkeypatch, change):
    # The plain one first: what was found out about its shape must not speak for one that only equals it.
    for header in ({"z": {**INFO, **change}}, {"y": {**INFO, "data_offsets": [0, 24]}, "z": {**INFO, **change}}):
        path = write(tmp_path / "x.safetensors", json.dumps(header), 24)
        short, long = both_ways(path, monkeypatch)
        assert short == long


def test_an_extent_that_only_equals_a_number_is_refused(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [1, 4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [True, 4], "data_offsets": [4, 8]},
    }
    with pytest.raises(CheckpointError, match="shape"):
        read_safetensors(write(tmp_path / "x.safetensors", json.dumps(header), 8))


def test_mutations(tmp_path, monkeypatch):
    rng = random.Random(0)
    text = json.dumps({"__metadata__": {"format": "pt"}, **GOOD}, separators=(",", ":"))
    accepted = 0
    for _ in range(4000):
        start = rng.randrange(len(text))
        end = min(len(text), start + rng.randrange(8))
        path = write(tmp_path / "x.safetensors", text[:start] + rng.choice(PIECES) * rng.randrange(2) + text[end:])
        short, long = both_ways(path, monkeypatch)
        assert short == long
        accepted += not isinstance(short, str)
    assert accepted > 20


def test_a_key_twice(tmp_path, monkeypatch):
    one = json.dumps(INFO)
    for header in (f'{{"a":{one},"a":{one}}}', f'{{"a":{one[:-1]},"dtype":"F32"}}}}'):
        short, long = both_ways(write(tmp_path / "x.safetensors", header, 24), monkeypatch)
        assert short == long
        assert "twice" in short
    assert plain_header.plain_entries("[]", tmp_path, 0, 0) is None
