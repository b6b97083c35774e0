"""A rank that is killed in the middle of a load."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from tests.distributed.models import fsdp, mesh
from torch import nn

import weightlift as wl

RANK = int(os.environ.get("RANK", "0"))
RANKS = int(os.environ.get("WORLD_SIZE", "2"))
PATIENCE_S = 2.0


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(40))


def _dying(done, total):
    if RANK == RANKS - 1 and done:
        os.kill(os.getpid(), signal.SIGKILL)


class Deadly(threading.Event):
    """A source looks at it every now and then, and some time for the last time."""

    looks = 0

    def is_set(self):
        self.looks += 1
        if self.looks > 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def _dies(victim=RANKS - 1, **options):
    torch.manual_seed(0)
    state = Layers().state_dict()
    began = time.monotonic()
    with pytest.raises(wl.RanksError, match=f"rank {victim}: no sign of life for 2 s while loading"):
        wl.load(
            Layers, state, parallelize=fsdp(mesh(RANKS)), workers=1, copy=True, rank_patience_seconds=PATIENCE_S,
            **options,
        )  # fmt: skip
    # Stated: the patience, once over for the beat and once for who hears of it. Generous, for busy machines.
    assert time.monotonic() - began < 15 * PATIENCE_S
    os._exit(0)  # a barrier would wait for the dead


def killed_while_reading():
    _noted(progress=_dying)


def killed_while_receiving():
    _noted(progress=_dying, source_rank=0)


def killed_while_sending():
    _noted(victim=0, source_rank=0, memory_budget_bytes=1 << 17, cancel=Deadly() if RANK == 0 else None)


def _noted(**options):
    try:
        _dies(**options)
    except BaseException:
        _note()
        raise


def _note():
    import traceback

    traceback.print_exc()
    os._exit(1)


SCENARIOS = {run.__name__: run for run in (killed_while_reading, killed_while_receiving, killed_while_sending)}
