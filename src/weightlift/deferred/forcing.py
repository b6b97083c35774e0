"""Giving tensors the values that they wait for: what somebody reads, hands out or is about to change."""

from __future__ import annotations

import logging
from typing import Any

import torch

from weightlift.ambient import outside_modes
from weightlift.deferred.forced import call_site
from weightlift.deferred.memory import Memory
from weightlift.deferred.replay import Walk, needed
from weightlift.deferred.tape import Node, Record, live_readers

_log = logging.getLogger("weightlift.deferred")


class Forcing(Memory):
    """Runs what is on the tapes of one scope. ``forced``: what made it do so, and how many bytes that were."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.forced: dict[str, int] = {}
        self._sampled_reads = 0

    def settle_readers(self, tensor: torch.Tensor, why: Any) -> None:
        """Run what has to read this memory before it is changed at once."""
        record = self.record_of(tensor)
        if record is not None:
            self._settle(record, why)

    def _settle(self, record: Record, why: Any) -> None:
        if readers := live_readers(record):
            self._execute(Walk().needed_by(readers), why)

    def give_up(self, tensors: list[torch.Tensor], why: Any) -> None:
        """Give these tensors their values, and put no later write to them off: somebody else may hold the memory."""
        for tensor in tensors:
            record = self.record_of(tensor)
            if record is not None:
                self.hand_out(record, why)

    def hand_out(self, record: Record, why: Any) -> None:
        """See `Memory.hand_out`."""
        if record.pending:
            self.force([record], why)
        record.memory()
        self._settle(record, why)  # before somebody writes there
        record.pinned = True

    def _next_read_label(self) -> str:
        self._sampled_reads += 1
        return f"\0read#{self._sampled_reads}"

    def force_tensors(self, tensors: list[torch.Tensor], why: Any) -> None:
        """Make the values of these tensors real, in their memory."""
        records = [record for tensor in tensors if (record := self.record_of(tensor)) is not None]
        self.force([record for record in records if record.pending], why)
        for record in records:
            record.memory()

    def force(self, records: list[Record], why: Any) -> None:
        """Run what ``records`` need. ``why`` is the call that asked, for the diagnostic."""
        if records:
            self._execute(needed(records), why)

    def _note(self, why: Any, nbytes: int) -> None:
        if nbytes:
            name = call_site(why)
            self.forced[name] = self.forced.get(name, 0) + nbytes
            _log.debug("constructor forced %d bytes by %s", nbytes, name)

    def _execute(self, nodes: list[Node], why: Any) -> None:
        # All that runs, not only what was asked for: a sum of a product of a sample makes three tensors.
        self._note(why, sum(record.nbytes for record in {record for node in nodes for record in node.writes}))
        with outside_modes():
            for node in nodes:
                if node.random and node.seed_label is None:
                    node.seed_label = self._next_read_label()
                node.execute(self.seed)
