"""One load of a module that is parallelised, or that several ranks load together: what `weightlift.api` calls."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightlift.checkpoint import Checkpoint
from weightlift.distributed import constructed, digest
from weightlift.distributed.apply import Ranks, apply_sharded, refuse_conflicts
from weightlift.distributed.shapes import Homes, filled, is_dtensor, put_back, settle, settled_again
from weightlift.distributed.stream import Stream
from weightlift.distributed.team import Team
from weightlift.distributed.unfilled import leave_unfilled
from weightlift.errors import CheckpointError, Problem, RanksError
from weightlift.options import LoadOptions
from weightlift.plan.records import Decisions
from weightlift.transfer.apply import apply
from weightlift.transfer.subject import Bytes, Load, Subject
from weightlift.transfer.ties import settled

if TYPE_CHECKING:
    from weightlift.distributed.wire import Wire


_NONE = "[]"  # no problems, for the way between ranks


class Together:
    """The distributed side of one plan: planned once, executed once, by one thread of each rank."""

    def __init__(self, options: LoadOptions) -> None:
        self._options = options
        wanted = options.parallelize is not None or options.source_rank is not None
        self._team = Team.of(options.process_group, options.rank_patience_seconds) if wanted else None
        self._homes: Homes | None = None
        self._tensors: Mapping[str, torch.Tensor] = {}  # of a checkpoint in memory
        self._leader = 0 if self._team is None else _leader(self._team, options.source_rank)

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Around all that is done before a byte is read; an error of one rank becomes one of all."""
        with self._at_work("planning"):
            yield

    def open(self, opened: Callable[[], Checkpoint]) -> Checkpoint:
        """The checkpoint: with ``source_rank`` one rank opens it and tells the others what it found."""
        if self._team is None or self._options.source_rank is None:
            checkpoint = opened()
            self._tensors = checkpoint.tensors
            return checkpoint
        wire = self._wire(self._team)
        headers = _headers(opened()) if self._team.rank == self._leader else None
        own, shared = headers if headers is not None else (None, None)
        found = wire.hand_out(shared, self._leader)
        return own if own is not None else _Unseen(**found)

    def seeded(self, given: int | None) -> LoadOptions:
        """The options with one seed on all ranks: where the user gave none, that of the rank that leads.

        Raises RanksError where ranks differ in what the way to a plan depends on: they would wait for one another.
        """
        team = self._team
        if team is None:
            return self._options

        def judge(notes: list[str]) -> str:
            found = _differences(notes, team)
            return found if found != _NONE else str(json.loads(notes[self._leader])["seed"])

        chosen = [self._options.source_rank, given is None]
        verdict = team.exchange(json.dumps({"options": str(chosen), "seed": self._options.seed}), judge)
        if verdict.startswith("["):
            raise _differ(verdict)
        if given is None:
            self._options = replace(self._options, seed=int(verdict))
        return self._options

    def settle(self, decisions: Decisions, subject: Subject) -> bool:
        """Compare plans with the other ranks. False when the module is an ordinary one after all.

        A plan with problems, the same on all ranks, is left as it is. Raises RanksError when ranks differ, and
        PlanError where a DTensor of the module can't be filled. A plan changes nothing: see `spread`.
        """
        if self._team is not None:
            self._agree(self._team, decisions)
        if decisions.problems:
            return self._team is not None
        if self._team is not None and self._parallelizes and not self._options.defer:
            self._compare_missing(self._team, decisions, subject)
        if not self._parallelizes and any(is_dtensor(slot.tensor) for slot in subject.inventory.slots):
            self._homes = settle(subject.inventory, decisions.rows, None)
        if self._team is not None:
            self._team.all_done()
        return self._team is not None or self._parallelizes or self._homes is not None

    @property
    def _parallelizes(self) -> bool:
        return self._options.parallelize is not None

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around `settled`, `spread` and `execute`."""
        with self._at_work("loading"):
            yield

    @contextlib.contextmanager
    def spread(self, decisions: Decisions, subject: Subject) -> Iterator[None]:
        """Around `execute`: the module is parallelised. Where something fails it has its tensors of before.

        Raises what ``parallelize`` raises, on any rank, before a byte is read.
        """
        if not self._parallelizes:
            yield
            return
        with put_back(subject.inventory):
            if self._homes is None:
                self._homes = settle(subject.inventory, decisions.rows, self._options.parallelize)
            else:
                settled_again(self._homes)
            if self._team is not None:
                self._team.all_done()
            yield
        self._homes = filled(self._homes) if subject.existing else None

    def settled(self, decisions: Decisions, source: Bytes, options: LoadOptions) -> Decisions:
        """As `weightlift.transfer.ties.settled`. One rank compares the bytes of tied names, and tells the others."""
        team = self._team
        if self._parallelizes or self._homes is not None:
            refuse_conflicts(decisions, source, options, self._ranks)
            return decisions
        if team is None:
            return settled(decisions, source, options)
        if not decisions.checks:
            return decisions
        own = settled(decisions, source, options) if team.rank == self._leader else decisions
        changed = self._wire(team).hand_out(None if own is decisions else (own.rows, own.left_out), self._leader)
        if changed is None or team.rank == self._leader:
            return own
        rows, left_out = changed
        return replace(decisions, rows=rows, left_out=left_out)

    def execute(self, load: Load) -> nn.Module:
        """Carry the plan out on this rank, and wait until every rank has. Raises as `weightlift.load` does."""
        module = self._execute(load)
        if self._team is not None:
            self._team.all_done()
        return module

    def _execute(self, load: Load) -> nn.Module:
        team = self._team
        if self._homes is not None:
            return apply_sharded(load, self._homes, self._ranks)
        if team is not None and load.options.source_rank is not None and team.rank != self._leader:
            return leave_unfilled(load)
        return apply(load)

    @property
    def _ranks(self) -> Ranks | None:
        team = self._team
        if team is None:
            return None
        stream = None
        if self._options.source_rank is not None:
            stream = Stream(team, self._wire(team), self._leader, self._options)
        return Ranks(team, self._leader, stream)

    def _wire(self, team: Team) -> Wire:
        from weightlift.distributed.wire import Wire  # imports torch.distributed

        return Wire(team, self._options.process_group)

    @contextlib.contextmanager
    def _at_work(self, stage: str) -> Iterator[None]:
        if self._team is None:
            yield
        else:
            with self._team.at_work(stage):
                yield

    def _agree(self, team: Team, decisions: Decisions) -> None:
        def judge(notes: list[str]) -> str:
            found = _differences(notes, team)
            if found != _NONE:
                return found
            return "same" if digest.same_places(notes) else "compare"

        verdict = team.exchange(digest.note_of(decisions, self._options), judge)
        if verdict == "compare" and self._options.source_rank is None:
            note = digest.samples_of(decisions, self._tensors)
            verdict = team.exchange(note, lambda notes: _differences(notes, team))
            verdict = "same" if verdict == _NONE else verdict
        if verdict not in ("same", "compare"):
            raise _differ(verdict)

    def _compare_missing(self, team: Team, decisions: Decisions, subject: Subject) -> None:
        """What ordinary constructors gave the missing weights has to be the same on all ranks."""
        own = constructed.note_of_missing(subject.inventory.slots, decisions.rows)
        verdict = team.exchange(own, lambda notes: digest.as_text(constructed.differences(notes, team.names)))
        if verdict != _NONE:
            raise _differ(verdict)


def _differences(notes: list[str], team: Team) -> str:
    """Who differs from most in what, for the way between ranks."""
    return digest.as_text(digest.differences(notes, team.names))


def _differ(verdict: str) -> RanksError:
    return RanksError("the ranks do not load the same; nothing was read", digest.from_text(verdict))


def _leader(team: Team, source_rank: int | None) -> int:
    """The rank, as the team numbers it, that reads for all."""
    if source_rank is None:
        return 0
    if source_rank not in team.names:
        raise ValueError(f"source_rank {source_rank} is not of the process group, whose ranks are {list(team.names)}")
    return team.names.index(source_rank)


class _Unseen(Checkpoint):
    """A checkpoint as its headers tell of it, on a rank that sees no values."""

    __slots__ = ()

    def read(self, key: str) -> torch.Tensor:
        """Raises CheckpointError: only state-dict hooks ask for values before all ranks have agreed to read."""
        hint = "leave source_rank out, with the files where every rank can see them"
        problem = Problem("a state-dict hook of the module uses its values, which only source_rank has", key, hint=hint)
        raise CheckpointError(f"cannot read {self.source} on this rank", [problem])


def _headers(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint, and what makes one of equal headers on a rank that can't see the files."""
    versions = checkpoint.state_dict_metadata
    shared = {
        "source": checkpoint.source,
        "entries": {key: replace(checkpoint[key]) for key in checkpoint},
        "extras": dict(checkpoint.extras),
        "state_dict_metadata": None if versions is None else {name: dict(item) for name, item in versions.items()},
    }
    return checkpoint, shared
