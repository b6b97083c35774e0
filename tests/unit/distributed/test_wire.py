"""Operations are seen through, whatever comes in between: alone, with a group that is not there."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from weightlift.distributed.rounds import Rounds
from weightlift.distributed.wire import Wire
from weightlift.errors import Problem, RanksError


class Team:
    """Of two ranks, of which this is the first."""

    rank, size = 0, 2

    def __init__(self, lost=False):
        self.lost = lost
        self.reported = []

    def look_for_losses(self):
        self.check_lives()

    def check_lives(self):
        if self.lost:
            raise RanksError("other ranks failed, so this one gives up", [Problem("rank 1: no sign of life")])

    def report(self, error):
        self.reported.append(error)

    def give_up(self):
        raise RanksError("other ranks failed, so this one gives up", [Problem("rank 1: LoadCancelled")])


class Work:
    def __init__(self):
        self.end = threading.Event()

    def wait(self):
        self.end.wait(20)


def _wire(team):
    wire = Wire.__new__(Wire)
    wire._team, wire._group, wire.device = team, None, torch.device("cpu")
    return wire


def test_an_interruption_is_raised_once_the_operation_has_ended():
    work = Work()
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    ends = threading.Timer(0.8, work.end.set)
    interrupt.start()
    ends.start()
    with pytest.raises(KeyboardInterrupt):
        _wire(Team())._finish(lambda: work)
    assert work.end.is_set()


def test_the_loss_of_a_rank_ends_the_wait():
    work = Work()
    with pytest.raises(RanksError, match="rank 1: no sign of life"):
        _wire(Team(lost=True))._finish(lambda: work)
    work.end.set()


def test_an_operation_that_the_backend_refuses_is_a_broken_connection():
    def refused():
        raise RuntimeError("closed by peer")

    with pytest.raises(RanksError, match="the connection to another rank broke: closed by peer"):
        _wire(Team())._finish(refused)


class Sums:
    """A wire on which the other rank says what is given."""

    device = torch.device("cpu")

    def __init__(self, *others):
        self.others = list(others)

    def add_up(self, tensor):
        said = self.others.pop(0)
        if isinstance(said, BaseException):
            tensor += torch.tensor([3, 0, 0])
            raise said
        tensor += torch.tensor(said)


def test_what_was_kept_is_raised_at_the_next_round():
    team, error = Team(), ValueError("mine")
    rounds = Rounds(team, Sums([2, 0, 0], [0, 0, 0]))
    assert rounds.begin() == [2, 0]
    with rounds.keeping():
        raise error
    with rounds.keeping():
        raise KeyError("later, and no news")
    assert rounds.failed
    with pytest.raises(ValueError, match="mine"):
        rounds.begin()
    assert team.reported == [error]
    assert not rounds.failed


def test_another_ranks_error_ends_the_rounds_here_too():
    rounds = Rounds(Team(), Sums([2, 0, 1]))
    with pytest.raises(RanksError, match="rank 1: LoadCancelled"):
        rounds.begin()


def test_an_interruption_of_the_agreement_does_not_take_this_rank_out_of_the_round():
    rounds = Rounds(Team(), Sums(KeyboardInterrupt(), [3, 0, 0]))
    assert rounds.begin() == [3, 0]
    with pytest.raises(KeyboardInterrupt):
        rounds.begin()


def test_after_the_last_round_nothing_is_begun():
    assert Rounds(Team(), Sums([0, 0, 0])).begin() == []


def test_the_loss_of_a_rank_is_not_kept():
    rounds = Rounds(Team(), Sums())
    with pytest.raises(RanksError), rounds.keeping():
        raise RanksError("lost")
