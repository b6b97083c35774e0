"""A short run of the fuzzer (fuzz.py is the long one), and the corpus: every bad file with the exact error expected."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fuzz import mutate
from fuzz_targets import Target, open_any, packed_seeds, unpack

from weightlift.errors import CheckpointError

CORPUS = Path(__file__).with_name("corpus")
TARGETS = ("safetensors", "index", "zip", "legacy", "dduf", "dcp", "distcp")


@pytest.mark.parametrize("name", TARGETS)
def test_random_mutations(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    target, rng, pool = Target(name, folder), random.Random(7), packed_seeds(name)
    assert any(target.check(unpack(name, data)) == "accepted" for data in pool)
    for _ in range(1000):
        target.check(unpack(name, mutate(rng.choice(pool), rng, pool)))


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    target = Target(name, folder)
    expected: dict[str, list[str]] = json.loads((CORPUS / f"{name}.json").read_text())
    assert len(expected) > (12 if name == "dcp" else 20)
    for number, errors in expected.items():
        assert told(target, (CORPUS / name / number).read_bytes()) == errors, number


def told(target: Target, data: bytes) -> list[str]:
    """The problems of a file, without the folder that it lies in."""
    target.path.write_bytes(data)
    try:
        open_any(target.name, target.path)
    except CheckpointError as error:
        return [str(problem).replace(str(target.folder), "").replace(str(target.folder.parent), "..")[:400]
                for problem in error.problems]  # fmt: skip
    return []


def write_corpus(kept: Path) -> None:
    """Make the corpus from what ``fuzz.py --keep`` saved: one small file for each distinct error."""
    import tempfile

    for name in TARGETS:
        folder = Path(tempfile.mkdtemp()) / "checkpoint"
        folder.mkdir()
        target = Target(name, folder)
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        made = {}
        for path in sorted((kept / name).iterdir()):
            data = path.read_bytes()
            if len(data) <= 4500:
                made[path.name] = told(target, data)
                (CORPUS / name / path.name).write_bytes(data)
        (CORPUS / f"{name}.json").write_text(json.dumps(made, indent=1, ensure_ascii=True) + "\n")
