"""Nets, taps and programs made up at random: shared and repeated modules, recursion, failures, checkpointing, threads,
users' hooks, nested captures, changes of the structure.

Each program runs twice, on a net with captures and on its copy with plain hooks, put on last, whose records are made
by hand. Values, their order, names and gradients have to be the same, and what the net returns; and a capture has to
raise where the records by hand say that something is lacking.
"""

from __future__ import annotations

import contextvars
import copy

from hypothesis import given
from tests.property.made_nets import DICTIONARIES, net_of
from tests.property.made_programs import Hooked, Result, Watched, choice, gradients, nodes, programs
from tests.property.search import SEARCH
from tests.property.taps_by_hand import alike


@SEARCH
@given(nodes, programs, choice)
def test_a_capture_records_what_plain_hooks_do(nodes, program, inner):
    model = net_of(nodes)
    sides = [Watched(copy.deepcopy(model), inner, True), Hooked(copy.deepcopy(model), inner, True)]
    ours, theirs = sides
    dictionaries = [(vars(module), name, vars(module)[name]) for module in ours.made for name in DICTIONARIES]
    for side in sides:
        try:
            contextvars.copy_context().run(side.run, program)
        finally:
            for handle in side.handles:
                handle.remove()
    assert len(ours.log) == len(theirs.log)
    for one, other in zip(ours.log, theirs.log):
        assert alike(one, other), (one, other)
    assert len(ours.results) == len(theirs.results)
    for one, other in zip(ours.results, theirs.results):
        compare(one, other)
    if not any(other.lost and one.error for one, other in zip(ours.results, theirs.results)):
        assert alike(gradients(ours), gradients(theirs))
    assert all(owner[name] is dictionary for owner, name, dictionary in dictionaries)
    assert not any(vars(module)[name] for module in ours.made for name in DICTIONARIES)


def compare(found: Result, wanted: Result) -> None:
    if wanted.lost and found.error is not None:
        return
    for name, values in wanted.values.items():
        assert alike(found.values[name], values), (name, found.values[name], values)
        assert alike(found.calls[name], wanted.calls[name]), name
    assert found.forwards == wanted.forwards
    if wanted.wrong:
        assert found.error is not None, wanted.wrong
    elif found.error is not None:
        assert wanted.may_be_wrong, found.error
