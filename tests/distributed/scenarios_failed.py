"""Loads that fail or are cancelled at several moments leave nothing behind on the process group.

Afterwards every rank uses the group as its owner would, and loads once more.
"""

from __future__ import annotations

import os
import threading

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import Tied, assert_same_state, checkpoint_of, fsdp, mesh
from tests.distributed.scenarios_two import FOLDER, RANK, _saved
from torch import nn

import weightlift as wl

RANKS = int(os.environ.get("WORLD_SIZE", "2"))
LAST = RANKS - 1
BUDGET_BYTES = 1 << 17  # rounds of 64 KiB, in one message or several


class Layers(nn.Module):
    """Matrices of one size, 64 KiB each, and so are all messages in which they come whole."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(30))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96 + 8 * (number % 3), 100) for number in range(30))


def _the_group_works():
    """What a user would call next, in sizes that a left-over message could be taken for."""
    for size in (1, 2, 77, 128 * 128):
        values = torch.full((size,), 7.0 + size) if RANK == 0 else torch.zeros(size)
        dist.broadcast(values, 0)
        assert torch.equal(values, torch.full((size,), 7.0 + size)), values
        for source in (0, LAST):
            numbers = torch.full((size,), 100.0 * source + size)
            if source == RANK:
                for other in set(range(RANKS)) - {source}:
                    dist.send(numbers, other)
            else:
                heard = torch.zeros(size)
                dist.recv(heard, source)
                assert torch.equal(heard, numbers), heard
        total = torch.ones(size)
        dist.all_reduce(total)
        assert torch.equal(total, torch.full((size,), float(RANKS))), total


def _loads_again(build=Layers):
    """With other values than those of the load that failed."""
    state = checkpoint_of(build, seed=1)
    reference = wl.load(build, state)
    for way in (sharded, alike):
        assert_same_state(wl.load(build, state if RANK == 0 else None, **way()), reference)
    assert wl.load(build, state if RANK == 0 else None, **unfilled())


def _fails(who, expected, text, load, *ways):
    """``load`` raises ``expected`` on one rank, and on the others what that says; then all is as before."""
    for way in ways:
        for _ in range(2):
            with pytest.raises(expected if who == RANK else wl.RanksError, match=None if who == RANK else text):
                load(**way())
            _the_group_works()
        _loads_again()


def unfilled():
    return {"source_rank": 0}


def sharded():
    return {"source_rank": 0, "parallelize": fsdp(mesh(RANKS))}


def alike():
    return {"source_rank": 0, "parallelize": lambda model: model}


def the_source_finds_no_checkpoint():
    def load(**options):
        wl.load(Tied, "/nowhere", **options)

    _fails(0, wl.CheckpointError, "rank 0: CheckpointNotFound", load, unfilled, sharded)


def the_wrong_path_and_at_once_the_right_one():
    path = _saved("right.pt", checkpoint_of(Tied))
    loaded = []
    for mine in ("/nowhere", path):
        try:
            loaded.append(wl.load(Tied, mine, source_rank=0))
        except wl.WeightliftError:
            assert mine == "/nowhere"
    assert len(loaded) == 1
    _the_group_works()


def the_source_refuses_what_only_it_can_compare():
    state = checkpoint_of(Tied)
    state["head.weight"] = state["head.weight"] + 1

    def load(**options):
        wl.load(Tied, state, **options)

    _fails(0, wl.PlanError, "rank 0: PlanError", load, unfilled)


def a_rank_that_makes_no_such_load_is_not_called_killed():
    group = dist.new_group(range(RANKS))  # of which the ranks count their loads apart
    if RANK == 0:
        with pytest.raises(wl.RanksError, match=r"rank [1-9]: it did not come within 1 s .* makes no such load"):
            wl.load(Layers, {}, strict=False, **sharded(), process_group=group, rank_patience_seconds=0.1)
    dist.barrier()


class Doubled(Layers):
    """A state-dict hook that computes with values, which a rank without files can't."""

    def _load_from_state_dict(self, state, prefix, *rest):
        state["layers.0.weight"] = state.pop("half") * 2
        super()._load_from_state_dict(state, prefix, *rest)


def hooks_that_compute_with_values_are_refused_with_what_to_do():
    state = checkpoint_of(Layers)
    state["half"] = state.pop("layers.0.weight") / 2
    path = _saved("half.pt", state)
    for source in (path, state):
        for way in (sharded, alike, unfilled):
            expected = wl.RanksError if RANK == 0 else wl.CheckpointError
            with pytest.raises(expected, match=r"half: a state-dict hook .* uses its values.* leave source_rank out"):
                wl.load(Doubled, source, **way())
        _the_group_works()
        wl.load(Doubled, source, parallelize=lambda model: model)  # as the hint says


def a_constructor_fails_on_a_rank_that_receives():
    state = checkpoint_of(Tied)

    def build():
        if RANK == LAST:
            raise KeyError("only here")
        return Tied()

    def load(**options):
        wl.load(build, state, **options)

    _fails(LAST, KeyError, f"rank {LAST}: KeyError", load, unfilled, sharded)


def _cancelled(build, after, **budget):
    """A load of which the last rank has enough when it has received some of it."""
    state = checkpoint_of(build)

    def load(**options):
        cancel = threading.Event()
        if RANK == LAST and after is None:
            cancel.set()

        def seen(done, total):
            if RANK == LAST and after is not None and done > after * total:
                cancel.set()

        wl.load(build, state, cancel=cancel, progress=seen, **budget, **options)

    _fails(LAST, wl.LoadCancelled, f"rank {LAST}: LoadCancelled", load, sharded, alike)


def a_receiver_of_equal_messages_is_cancelled():
    _cancelled(Layers, 0.3, memory_budget_bytes=BUDGET_BYTES)


def a_receiver_of_messages_of_many_sizes_is_cancelled():
    _cancelled(Mixed, 0.3, memory_budget_bytes=BUDGET_BYTES)


def a_receiver_is_cancelled_while_the_only_round_is_under_way():
    _cancelled(Layers, 0.0)


def a_receiver_is_cancelled_before_it_begins():
    _cancelled(Layers, None)


def what_is_told_of_the_progress_fails():
    state = checkpoint_of(Layers)

    def tell(done, total):
        if RANK == LAST and 2 * done > total:
            raise KeyboardInterrupt

    def load(**options):
        wl.load(Layers, state, progress=tell, memory_budget_bytes=BUDGET_BYTES, **options)

    _fails(LAST, KeyboardInterrupt, f"rank {LAST}: KeyboardInterrupt", load, sharded, alike)


class CancelledLater(threading.Event):
    """Set, as far as the load can see, once it has been looked at a few times."""

    looks = 0

    def is_set(self):
        self.looks += 1
        return RANK == 0 and self.looks > 12


def the_source_is_cancelled_in_the_middle():
    state = checkpoint_of(Layers)

    def load(**options):
        wl.load(Layers, state, cancel=CancelledLater(), workers=1, memory_budget_bytes=BUDGET_BYTES, **options)

    _fails(0, wl.LoadCancelled, "rank 0: LoadCancelled", load, sharded, alike)


def the_source_can_read_no_further():
    path = FOLDER / "cut.pt"

    def cut(done, total):
        if RANK == LAST and 3 * done > total:
            os.truncate(path, 4000)

    def load(**options):
        _saved("cut.pt", checkpoint_of(Layers))
        wl.load(Layers, path, progress=cut, copy=True, memory_budget_bytes=BUDGET_BYTES, **options)

    _fails(0, wl.WeightliftError, "rank 0: ", load, sharded, alike)


SCENARIOS = {
    run.__name__: run
    for run in (
        the_source_finds_no_checkpoint,
        the_wrong_path_and_at_once_the_right_one,
        the_source_refuses_what_only_it_can_compare,
        a_rank_that_makes_no_such_load_is_not_called_killed,
        hooks_that_compute_with_values_are_refused_with_what_to_do,
        a_constructor_fails_on_a_rank_that_receives,
        a_receiver_of_equal_messages_is_cancelled,
        a_receiver_of_messages_of_many_sizes_is_cancelled,
        a_receiver_is_cancelled_while_the_only_round_is_under_way,
        a_receiver_is_cancelled_before_it_begins,
        what_is_told_of_the_progress_fails,
        the_source_is_cancelled_in_the_middle,
        the_source_can_read_no_further,
    )
}
