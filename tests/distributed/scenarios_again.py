"""A process that initialises torch.distributed more than once."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch.distributed as dist
from tests.distributed.models import Tied, assert_same_state, checkpoint_of

import weightlift as wl

RANK = int(os.environ.get("RANK", "0"))
RANKS = 3


def groups_that_come_later_have_the_names_of_earlier_ones():
    """Ranks with different pasts meet in a group: one has loaded before in another one of that name."""
    state = checkpoint_of(Tied)
    port = int(sys.argv[2])
    names = set()
    for round_, members in enumerate(([0, 1], [1, 2])):
        dist.destroy_process_group()
        store = dist.PrefixStore(f"round{round_}", dist.TCPStore("127.0.0.1", port, is_master=False))
        dist.init_process_group("gloo", rank=RANK, world_size=RANKS, store=store, timeout=timedelta(seconds=60))
        group = dist.new_group(members)
        if RANK in members:
            names.add(group.group_name)
            for options in ({}, {"source_rank": members[1]}):
                options |= {"process_group": group, "rank_patience_seconds": 2}
                model = wl.load(Tied, state, parallelize=lambda model: model, **options)
                assert_same_state(model, wl.load(Tied, state))
        dist.barrier()
    assert len(names) == 1


SCENARIOS = {run.__name__: run for run in (groups_that_come_later_have_the_names_of_earlier_ones,)}
