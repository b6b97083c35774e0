"""Storages that a constructor fills piece by piece: run and written to at once after so many calls, and which wait."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import weightlift as wl
from weightlift.deferred.functions import FunctionRecorder
from weightlift.deferred.recorder import Recorder

ROWS, COLUMNS = 60, 16


def by_numbers(table):
    for row in range(ROWS):
        for column in range(COLUMNS):
            table[row, column] = math.sin(row / 10 ** (column / COLUMNS))


def by_chained_numbers(table):
    for row in range(ROWS):
        for column in range(COLUMNS):
            table[row][column] = row - column


def by_rows(table):
    for row in range(ROWS * 2):
        table[row % ROWS] = torch.sin(row * torch.arange(COLUMNS))


def by_slices(table):
    for row in range(ROWS):
        table[row, 0::2] = torch.full((COLUMNS // 2,), float(row))
        table[row, 1::2] = row * 0.5


def by_fills(table):
    for row in range(ROWS * 2):
        table[row % ROWS].fill_(row)


def by_additions(table):
    for row in range(ROWS * 3):
        table[row % ROWS] += row


WAYS = [by_numbers, by_chained_numbers, by_rows, by_slices, by_fills, by_additions]


class Table(nn.Module):
    def __init__(self, fill, dtype=torch.float32):
        super().__init__()
        table = torch.zeros(ROWS, COLUMNS, dtype=dtype)
        fill(table)
        self.register_buffer("table", table.unsqueeze(0))


@pytest.fixture
def recorder():
    made = Recorder(seed=3)
    with FunctionRecorder(made), made:
        yield made


@pytest.mark.parametrize("fill", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_table_has_the_values_that_were_written(fill, dtype):
    if dtype is torch.int64 and fill is by_additions:
        dtype = torch.int32
    expected = Table(fill, dtype).table
    made = wl.load(lambda: Table(fill, dtype), {}, strict=False)
    assert made.table.dtype is dtype
    assert torch.equal(made.table, expected)


@pytest.mark.parametrize("fill", WAYS)
def test_few_calls_of_a_table_are_kept(recorder, fill):
    table = torch.zeros(ROWS, COLUMNS)
    fill(table)
    assert recorder._seq < 200
    record = recorder.record_of(table)
    assert not record.pending
    assert any("test_deferred_piecemeal" in name for name in recorder.forced)


def test_a_table_that_the_checkpoint_has_is_the_checkpoints():
    state = {"table": torch.randn(1, ROWS, COLUMNS)}
    assert torch.equal(wl.load(lambda: Table(by_numbers), state).table, state["table"])


def test_few_calls_on_a_large_weight_wait(recorder):
    weight = nn.init.dirac_(torch.empty(512, 512, 4, 4))
    assert recorder.record_of(weight).pending
    assert not recorder.forced
    recorder.force_tensors([weight], "the test")
    with torch._C._DisableTorchDispatch():
        assert torch.equal(weight, nn.init.dirac_(torch.zeros(512, 512, 4, 4)))


def seeded(calls):
    """A layer whose samples wait, and that is written to."""

    def make():
        layer = nn.Linear(COLUMNS, ROWS)
        with torch.no_grad():
            for number in range(calls):
                layer.weight[number % ROWS, 0] = number
        return layer

    return make


def test_samples_wait_and_are_seeded_by_the_name_however_much_is_written():
    few, many = (wl.load(seeded(calls), {}, strict=False, seed=5) for calls in (1, 500))
    assert torch.equal(few.weight[:, 1:], many.weight[:, 1:])
    assert wl.defer(seeded(500)).forced == {}


def test_what_reads_the_table_before_a_write_sees_it_as_it_was(recorder):
    table = torch.zeros(ROWS, COLUMNS)
    table[0, 0] = 7.0
    seen = table + torch.rand(ROWS, COLUMNS) * 0
    for number in range(300):
        table[0, 0] = number
    recorder.force_tensors([seen, table], "the test")
    with torch._C._DisableTorchDispatch():
        assert seen[0, 0] == 7
        assert table[0, 0] == 299


def test_what_comes_from_a_checkpoint_is_not_read_for_it(recorder):
    weight, read = torch.empty(ROWS, COLUMNS), []

    def fill(target):
        read.append(True)
        target.fill_(2)

    recorder.record_source(weight, fill)
    by_additions(weight)
    assert not read
    assert recorder.record_of(weight).pending
    recorder.force_tensors([weight], "the test")
    with torch._C._DisableTorchDispatch():
        assert weight[1, 0] == 2 + 1 + (1 + ROWS) + (1 + 2 * ROWS)


ODD = [
    lambda table: table.__setitem__((ROWS, 0), 1.0),
    lambda table: table.__setitem__((0, 0, 0), 1.0),
    lambda table: table.__setitem__((0, -COLUMNS - 1), 1),
    lambda table: table.__setitem__((0, 0), "one"),
]


@pytest.mark.parametrize("call", ODD)
def test_torch_refuses_as_ever(recorder, call):
    table = torch.zeros(ROWS, COLUMNS)
    by_numbers(table)
    with pytest.raises((IndexError, TypeError, RuntimeError)) as found:
        call(table)
    with torch._C._DisableTorchDispatch(), pytest.raises(type(found.value)) as expected:
        call(torch.zeros(ROWS, COLUMNS))
    assert str(found.value) == str(expected.value)


def test_a_leaf_that_requires_grad_is_refused_as_ever(recorder):
    weight = nn.Parameter(torch.zeros(ROWS, COLUMNS))
    with torch.no_grad():
        by_numbers(weight)
    with pytest.raises(RuntimeError, match="leaf"):
        weight[0, 0] = 1.0


def test_every_index_means_what_it_means(recorder):
    table = torch.zeros(ROWS, COLUMNS)
    by_numbers(table)
    plain = Table(by_numbers, torch.float32).table[0].clone()
    for each in (table, plain):
        each[-1, -1] = True
        each[0, True] = 3.5
        each[1] = 4
        each[2:5, 1] = 2.0
        each[6, 1] = np.float64(0.1)
        each[6, np.int64(2)] = np.float64(0.1)
        each[..., 0] = 9
    recorder.force_tensors([table, plain], "the test")
    with torch._C._DisableTorchDispatch():
        assert torch.equal(table, plain)


def test_another_mode_sees_the_write(recorder):
    table = torch.zeros(ROWS, COLUMNS)
    by_numbers(table)
    with FakeTensorMode() as mode:
        fake = torch.empty(3, 4)
        fake[0, 0] = 1.0
        assert fake.fake_mode is mode


class Overriding(nn.Module):
    """Looks at its weight and then writes it piece by piece."""

    def __init__(self, base, count):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(100))
        self.base, self.count = base, count

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}weight", None)
        with torch.no_grad():
            table = self.weight.data
            float(table.sum())
            for place in range(self.count):
                table[place] = float(self.base + place)


@pytest.mark.parametrize("count", [10, 100])
def test_code_for_the_state_dict_that_writes_piece_by_piece(count):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Overriding(100, count), Overriding(200, 3)
            self.second.weight = self.first.weight

    state = {"first.weight": torch.ones(100), "second.weight": torch.ones(100)}
    wanted = Pair()
    wanted.load_state_dict(state, strict=False)
    loaded = wl.load(Pair, state, strict=False)
    assert loaded.first.weight is loaded.second.weight
    assert torch.equal(loaded.first.weight, wanted.first.weight)


class Looking(TorchFunctionMode):
    """Somebody's mode that reads another tensor when a table is written to."""

    def __init__(self):
        super().__init__()
        self.held, self.seen = None, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__ and self.held is not None:
            self.seen.append(float(self.held.sum()))
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_callers_reads_right_values():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            large, table = torch.ones(300, 300), torch.zeros(200)
            for place in range(200):
                looking.held = large if place == 150 else None
                table[place] = place
            self.register_buffer("table", table)

    with Looking() as looking:
        wl.defer(Two)
    assert looking.seen == [90_000]


def test_no_copy_of_a_table_is_made_for_those_who_read_it(recorder, monkeypatch):
    table = torch.zeros(256, 256)
    for row in range(256):
        table[row] = float(row)
    record = recorder.record_of(table)
    assert not record.pending
    weights = [torch.empty(256, 256) for _ in range(20)]
    for weight in weights:
        weight.copy_(table)
    assert all(recorder.record_of(weight).pending for weight in weights)
    assert len(record.readers.live()) == 20  # of the table itself
    table[0, 0] = 7.0  # which the readers must not see
    recorder.force_tensors([*weights, table], "the test")
    with torch._C._DisableTorchDispatch():
        assert all(weight[0, 0] == 0 and weight[255, 3] == 255 for weight in weights)
        assert table[0, 0] == 7


def sampled_after(pieces, *, whole):
    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(100, 4))
            with torch.no_grad():
                for place in range(pieces):
                    self.weight[place % 100, 0] = 0.0
                nn.init.normal_(self.weight if whole else self.weight[:, 1:])

    return Sampled


@pytest.mark.parametrize("whole", [True, False])
def test_samples_after_the_pieces_are_seeded_by_the_name(whole):
    few, many = (wl.load(sampled_after(count, whole=whole), {}, strict=False, seed=5) for count in (10, 300))
    assert torch.equal(few.weight, many.weight)
    deferred = wl.defer(sampled_after(300, whole=whole))
    assert not any("normal_" in name for name in deferred.forced)


def test_what_fails_waits_until_its_values_are_asked_for(recorder):
    table = torch.zeros(100)
    table.index_fill_(0, torch.tensor([500]), 1.0)
    for place in range(100):
        table[place] = place
    with pytest.raises(IndexError):
        float(table.sum())
