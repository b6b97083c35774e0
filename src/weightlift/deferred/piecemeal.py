"""Storages that a constructor fills piece by piece: a table of positions, written number by number.

Recording a call costs several times what a small one takes, and some 0.6 kB. A storage that keeps being written to is
therefore given its values after all, and changed at once from there on, as soon as it is small beside the number of
the calls.
"""

from __future__ import annotations

from torch._ops import OpOverload

from weightlift.deferred.replay import needed
from weightlift.deferred.tape import Node, Record

_FIRST = 64  # calls; asked again whenever there are twice as many, so that asking stays linear
_BYTES_A_CALL = 16 << 10  # so that few calls on a large weight, as ``dirac_`` makes them, commit no memory for it


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
    if any(node.random or not isinstance(node.func, OpOverload) for node in nodes):
        return []
    nbytes = sum(written.nbytes for written in {written for node in nodes for written in node.writes})
    return nodes if nbytes <= record.pieces * _BYTES_A_CALL else []
