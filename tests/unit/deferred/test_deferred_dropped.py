"""What a constructor looked at, let a recorded call read, and then let go of: the call reads what was there."""

import gc

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.deferred import reserve

SIDES = [4, 300, 1500]  # small, in an arena of its own block, and one whose pages go back by themselves


def copied(owner, source):
    owner.p.copy_(source)


def computed(owner, source):
    owner.p = nn.Parameter(source / float(source.sum()))


def added(owner, source):
    owner.p.add_(source)


def in_part(owner, source):
    owner.p[0] = source[0]
    owner.p[1:].copy_(source[1:] * 2)


def read_later(owner, source):
    twice = source * 2
    owner.p.copy_(twice)
    assert float(twice.sum())


def changed_between(owner, source):
    source.mul_(2)
    owner.p.copy_(source)
    source.add_(1)
    owner.p.add_(source)


def in_two_steps(owner, source):
    other = source + 1
    del source
    assert float(other[0, 0])
    owner.p.copy_(other)
    owner.p.mul_(2)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "use", [copied, computed, added, in_part, read_later, changed_between, in_two_steps], ids=lambda use: use.__name__
)
def test_a_value_that_was_read_and_let_go_of_is_still_there_for_a_recorded_call(use, side):
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(side, side))
            source = torch.full((side, side), 2.0)
            source[0, 0] = 5
            assert float(source.sum())  # which makes its values
            with torch.no_grad():
                use(self, source)

    wanted = Made()
    assert torch.equal(wl.defer(Made).materialize().p, wanted.p)
    loaded = wl.load(Made, {}, strict=False)
    assert torch.equal(loaded.p, wanted.p)


def test_memory_that_outlived_its_tensor_goes_back_with_the_call_that_was_to_read_it(monkeypatch):
    given_back = []
    monkeypatch.setattr(reserve, "give_back", lambda block, offset, nbytes: given_back.append(nbytes))
    side = SIDES[-1]

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            source = torch.full((side, side), 2.0)
            assert float(source.sum())
            self.p = nn.Parameter(source * 3)
            del source
            assert not given_back

    gc.disable()
    try:
        loaded = wl.load(Made, {"p": torch.ones(side, side)})
        assert len(given_back) == 1 and given_back[0] >= 4 * side * side
    finally:
        gc.enable()
    assert torch.equal(loaded.p, torch.ones(side, side))


@pytest.mark.parametrize("collected", [False, True])
@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_samples_do_not_depend_on_what_has_been_collected(in_a_cycle, collected):
    def build():
        owner = nn.Module()
        weight = torch.randn(30, 30)
        copied = weight.clone()  # has to read the samples that are overwritten below
        dropped = [copied]
        if in_a_cycle:
            dropped.append(dropped)
        del copied, dropped
        if collected:
            gc.collect()
        owner.p = nn.Parameter(weight.normal_())
        return owner

    def plain():
        owner = nn.Module()
        owner.p = nn.Parameter(torch.randn(30, 30).normal_())
        return owner

    gc.disable()
    try:
        made = wl.defer(build, seed=3).materialize()
    finally:
        gc.enable()
    assert torch.equal(made.p, wl.defer(plain, seed=3).materialize().p)


def test_memory_that_somebody_takes_is_read_first_by_what_a_dropped_result_was_to_read():
    def build():
        owner = nn.Module()
        weight = torch.full((80, 80), 2.0)
        owner.p = nn.Parameter(weight * 2 + 1)  # of which the product is dropped
        weight.numpy()[:] = 9
        return owner

    assert torch.equal(wl.defer(build).materialize().p, build().p)
