"""Storages that a constructor fills piece by piece: a table of positions, written number by number.

Recording a call costs several times what a small one takes, and some 0.6 kB. A storage that keeps being written to is
therefore given its values after all, as soon as it is small beside the number of the calls, and changed at once from
there on: as long as nothing waits that has to be run for it, so that no sample is ever drawn for its sake.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch._ops import OpOverload

from weightlift.deferred.calls import Call
from weightlift.deferred.replay import needed
from weightlift.deferred.tape import Node, Record, ViewRef, live_readers

_FIRST = 64  # calls; asked again whenever there are twice as many, so that asking stays linear
_PIECE_BYTES = 64 << 10
_BYTES_A_CALL = 16 << 10  # so that few calls on a large weight, as ``dirac_`` makes them, commit no memory for it


def is_ready(record: Record) -> bool:
    """Whether a part of it can be written to at once."""
    return record.at_once and record.opened and not record.pending and not live_readers(record)


def is_time_to_ask(record: Record) -> bool:
    """Counts one more call that changed a part of ``record``, and says whether to look at `pieces`."""
    record.pieces += 1
    count = record.pieces
    return count >= _FIRST and not count & (count - 1)


def pieces(record: Record) -> list[Node]:
    """The calls to run now, so that ``record`` needs to wait for none; none if it had better wait.

    It does where samples are among them, which are seeded by the name that they are for, or what reads a checkpoint.
    """
    nodes = needed([record])
    return nodes if _are_cheap(nodes, record.pieces * _BYTES_A_CALL) else []


def is_piece(call: Call, targets: list[torch.Tensor], record: Record, beside: Iterable[Record | None]) -> bool:
    """Whether a call writes to a part of ``record`` that can be written to at once, and needs nothing that has better
    wait. ``beside``: the records of all its tensors."""
    if len(targets) != 1 or call.random or not is_ready(record):
        return False
    if call.overwrites and ViewRef(record, targets[0]).covers():
        return False
    waiting = [other for other in beside if other is not None and other.pending]
    return not waiting or _are_cheap(needed(waiting), _PIECE_BYTES)


def _are_cheap(nodes: list[Node], most: int) -> bool:
    if any(node.random or not isinstance(node.func, OpOverload) for node in nodes):
        return False
    return sum(written.nbytes for written in {written for node in nodes for written in node.writes}) <= most
