"""What a constructor leaves in a cache of the process has its values for the next one, whatever becomes of the load,
and in whichever thread the next one runs."""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import weightlift as wl

pytestmark = pytest.mark.filterwarnings("ignore")
STATE = {"linear.weight": torch.ones(4, 4), "linear.bias": torch.ones(4)}
LONG_SECONDS = 60


def made(positions, factor):
    rates = 1.0 / 10000 ** (torch.arange(0, 64, 2) / 64)
    angles = torch.outer(torch.arange(positions).float() * factor, rates)
    return torch.cat([angles.cos(), angles.sin()], -1)


table = functools.lru_cache(made)
LARGE = 2000  # above what is computed at once
TRUE = made(LARGE, 1)


@pytest.fixture(autouse=True)
def _empty_cache():
    table.cache_clear()


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", table(LARGE, 1), persistent=False)
        self.linear = nn.Linear(4, 4)


class ViewOfIt(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", table(LARGE, 1)[:10], persistent=False)
        self.linear = nn.Linear(4, 4)


class ParameterOfIt(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(table(LARGE, 1), requires_grad=False)
        self.linear = nn.Linear(4, 4)


class Unfinished(Rotary):
    def __init__(self):
        super().__init__()
        raise ValueError("not today")


def planned(build):
    wl.plan(build, STATE)


def refused(build):
    with pytest.raises(wl.PlanError):
        wl.load(build, {})


def deferred(build):
    wl.defer(build)


def failed(build):
    with pytest.raises(ValueError, match="not today"):
        wl.load(Unfinished, STATE)


@pytest.mark.parametrize("build", [Rotary, ViewOfIt, ParameterOfIt])
@pytest.mark.parametrize("before", [planned, refused, deferred, failed])
def test_a_cached_table_has_its_values_whatever_becomes_of_the_module_it_was_made_for(build, before):
    before(build)
    assert torch.equal(table(LARGE, 1), TRUE)
    assert torch.equal(Rotary().table, TRUE)
    assert torch.equal(wl.load(Rotary, STATE).table, TRUE)


def test_while_its_first_module_is_still_deferred_too():
    first = wl.defer(Rotary)
    assert torch.equal(wl.defer(Rotary).materialize().table, TRUE)
    assert torch.equal(first.load(STATE).table, TRUE)


def test_a_weight_that_is_held_elsewhere_still_waits():
    def build():
        module = nn.Linear(300, 300)
        module.held = [module.weight.data, module.bias.data]
        return module

    assert not wl.defer(build).forced


class Turns(nn.Module):
    """Makes one table, has the others make theirs, and takes another one's."""

    def __init__(self, own, other, meeting, done):
        super().__init__()
        table(LARGE, own)
        meeting.wait(LONG_SECONDS)
        self.register_buffer("table", table(LARGE, other), persistent=False)
        self.register_buffer("rounded", table(LARGE, other).bfloat16(), persistent=False)
        self.scale = torch.randn(3).abs().max().item()  # of its own, and the same whoever asks meanwhile
        done.append(own)
        while len(done) < meeting.parties:
            time.sleep(0.001)
            torch.zeros(1)


def loaded(own, other, meeting, done):
    return wl.load(lambda: Turns(own, other, meeting, done), {}, seed=7)


@pytest.mark.parametrize("count", [2, 3])
def test_constructors_in_several_threads_take_each_others_tables(count):
    meeting, done = threading.Barrier(count), []
    with ThreadPoolExecutor(count) as pool:
        loads = [pool.submit(loaded, own, (own + 1) % count, meeting, done) for own in range(count)]
        modules = [load.result(LONG_SECONDS) for load in loads]
    for number, module in enumerate(modules):
        expected = made(LARGE, (number + 1) % count)
        assert torch.equal(module.table, expected) and torch.equal(module.rounded, expected.bfloat16())
        assert module.scale == modules[0].scale


def test_a_load_ends_before_the_constructor_that_made_its_table():
    ready, done = threading.Event(), threading.Event()

    def slow():
        table(LARGE, 1)
        ready.set()
        while not done.wait(0.001):
            torch.zeros(1)
        return Rotary()

    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(wl.load, slow, STATE)
        assert ready.wait(LONG_SECONDS)
        try:
            module = wl.load(Rotary, STATE)
            assert torch.equal(module.table, TRUE)
        finally:
            done.set()
        assert load.result(LONG_SECONDS).table is module.table


def test_a_constructor_that_waits_for_who_waits_for_it_is_told(monkeypatch):
    monkeypatch.setattr("weightlift.deferred.neighbours.PATIENCE_SECONDS", 0.2)

    def waiting():
        table(LARGE, 1)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(wl.load, Rotary, STATE).result(LONG_SECONDS)
        return Rotary()

    with pytest.raises(RuntimeError, match="it may wait for this thread"):
        wl.load(waiting, STATE)
    assert torch.equal(wl.load(Rotary, STATE).table, TRUE)


def test_loads_within_loads_within_a_constructor_see_its_tensors():
    def innermost(weight):
        module = nn.Module()
        module.register_buffer("doubled", weight.detach() * 2)
        return module

    def inner(weight):
        module = nn.Module()
        module.part = wl.defer(lambda: innermost(weight)).materialize()
        return module

    def outer():
        module = nn.Module()
        module.weight = nn.Parameter(torch.full((300, 300), 3.0))
        module.part = wl.defer(lambda: inner(module.weight)).materialize()
        return module

    assert torch.equal(wl.defer(outer).materialize().part.part.doubled, torch.full((300, 300), 6.0))
