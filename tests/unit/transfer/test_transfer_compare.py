"""Do two entries hold the same values: by bits, in bounded memory."""

import threading

import pytest
import torch
from transfer_helpers import FaultySource, Saved, made_options, random_bits, union_bytes

from weightlift.checkpoint.entry import TensorEntry
from weightlift.checkpoint.memory import entry_of
from weightlift.errors import CheckpointChanged, LoadCancelled, TransferError
from weightlift.transfer.compare import Pair, same_values
from weightlift.transfer.subject import Bytes


def compare(saved, *pairs, tensors=None, workers=2, budget=None, source=None, cancel=None):
    entries = saved.entries if saved else {}
    found = [Pair(*(entries[x] if isinstance(x, str) else x for x in pair)) for pair in pairs]
    files = [saved.shard] if saved else []
    options = made_options(workers=workers, memory_budget_bytes=budget, cancel=cancel)
    return same_values(found, source=Bytes(files, tensors or {}, {}), options=options, store=source)


@pytest.fixture
def pairs(tmp_path):
    a = torch.randn(700_003)
    last = a.clone()
    last[-1] += 1
    nan = random_bits((1000, 300), torch.float32, 1)
    small = torch.randn(90_000).bfloat16()
    zero = torch.zeros(5)
    return Saved(tmp_path / "p.safetensors", {
        "a": a, "b": a.clone(), "last": last, "nan": nan, "nan2": nan.clone(), "small": small,
        "wide": small.float(), "z": zero, "mz": -zero, "other": zero.bfloat16(), "i": torch.arange(5),
        "e1": torch.empty(0, 3), "e2": torch.empty(0, 3), "e8": small.to(torch.float8_e4m3fn),
        "e8w": small.to(torch.float8_e4m3fn).bfloat16(), "sq": torch.randn(300, 1000),
        "nanb": torch.full((4,), float("nan")).bfloat16(), "nanf": torch.full((4,), float("nan")),
        "c": torch.randn(100, dtype=torch.complex64),
    })  # fmt: skip


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("budget", [None, 50_000])
def test_answers(pairs, workers, budget):
    cases = {
        ("a", "b"): True, ("a", "last"): False, ("nan", "nan2"): True, ("small", "wide"): True, ("z", "mz"): False,
        ("z", "other"): True, ("mz", "other"): False, ("a", "a"): True, ("a", "z"): False, ("e1", "e2"): True,
        ("e8", "e8w"): True, ("e8", "small"): False, ("nanb", "nanf"): True, ("c", "c"): True,
    }  # fmt: skip
    assert compare(pairs, *cases, workers=workers, budget=budget) == list(cases.values())


@pytest.mark.parametrize("workers", [1, 4])
def test_one_that_shows_the_other_conjugated_or_negated(tmp_path, workers):
    c, f = torch.randn(700_003, dtype=torch.complex64), torch.randn(90_000)
    saved = Saved(tmp_path / "p.safetensors", {
        "c": c, "conj": c.conj().resolve_conj(), "neg": -c, "both": -c.conj().resolve_conj(), "f": f, "nf": -f,
    })  # fmt: skip
    conjugated, negated, both = (True, False), (False, True), (True, True)
    cases = [
        ("c", "conj", conjugated, True), ("c", "neg", negated, True), ("c", "both", both, True),
        ("f", "nf", negated, True), ("f", "f", negated, False), ("c", "c", conjugated, False),
        ("c", "conj", negated, False), ("c", "neg", both, False),
    ]  # fmt: skip
    pairs = [Pair(saved.entries[a], saved.entries[b], lazily) for a, b, lazily, _ in cases]
    assert compare(saved, *pairs, workers=workers) == [wanted for *_, wanted in cases]


def test_the_same_place_is_not_read(pairs):
    source = FaultySource()
    assert compare(pairs, ("a", "a"), ("a", "z"), source=source) == [True, False]
    assert source.reads == []


@pytest.mark.parametrize("budget", [60_000, 1 << 20])
def test_staging_stays_in_the_budget(pairs, budget):
    source = FaultySource()
    assert compare(pairs, ("a", "b"), ("nan", "nan2"), budget=budget, source=source, workers=1) == [True, True]
    assert union_bytes(source.buffers) <= budget


@pytest.mark.parametrize("budget", [None, 60_000])
def test_strided_and_in_memory(pairs, budget):
    base = pairs.entries["sq"]
    turned = TensorEntry("t", (1000, 300), torch.float32, base.file, base.start, base.end, (1, 1000))
    value = pairs.tensors["sq"].t()
    memory = {"t": value, "flat": value.contiguous(), "bad": value + 1}
    inside = {k: entry_of(k, t) for k, t in memory.items()}
    cases = [(turned, inside["t"]), (turned, inside["flat"]), (turned, inside["bad"]), (inside["t"], inside["flat"]),
             (inside["t"], inside["t"]), (turned, turned), (inside["flat"], turned)]  # fmt: skip
    assert compare(pairs, *cases, tensors=memory, budget=budget) == [True, True, False, True, True, True, True]


def test_faults(pairs):
    def fault(buffer, offset):
        raise OSError(5, "broken")

    source = FaultySource(fault)
    with pytest.raises(TransferError) as caught:
        compare(pairs, ("a", "b"), source=source)
    assert caught.value.problems[0].key == "a" and caught.value.problems[0].start is not None
    assert source.open_handles == 0
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(LoadCancelled):
        compare(pairs, ("a", "b"), cancel=cancel)
    pairs.path.touch()
    with pytest.raises(CheckpointChanged):
        compare(pairs, ("a", "b"))
