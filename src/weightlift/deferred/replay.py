"""Running what was recorded: which calls depend on one another, and which may run at the same time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from weightlift.deferred.tape import Node, Record, Walk


@dataclass(frozen=True, slots=True)
class Replay:
    """Nodes that depend on one another, in the order in which they must run, and the records they give values to."""

    nodes: tuple[Node, ...]
    records: tuple[Record, ...]
    nbytes: int

    @property
    def failed_in(self) -> str:
        """After `run` has raised: the call that did."""
        func = next((node.func for node in self.nodes if not node.done), None)
        return getattr(func, "_opname", None) or getattr(func, "__name__", None) or str(func)

    def run(self, seed: int) -> None:
        """Execute the nodes; must be called outside every torch mode, without autograd; not twice."""
        last_use: dict[Record, Node] = {}
        for node in self.nodes:
            last_use.update(dict.fromkeys(node.touched, node))
        for node in self.nodes:
            touched = node.touched
            if not node.done:
                node.execute(seed)
            for record in touched:
                if last_use[record] is node:
                    record.release_scratch()


def label_samples(owned: Iterable[Record]) -> None:
    """Give every sampling call the name that seeds it: the first of ``owned`` that depends on it, and its turn.

    Which of the calls that only read what one overwrites are still of use depends on what has been collected by now, so
    their samples come after all others, under names of their own.
    """
    records = list(owned)
    for mark, readers in (("#", False), ("#read#", True)):
        walk = Walk(readers=readers)
        for record in records:
            count = 0
            for node in walk.needed([record]):
                if node.random and node.seed_label is None:
                    node.seed_label = f"{record.label}{mark}{count}"
                    count += 1


def replays(nodes: list[Node]) -> list[Replay]:
    """Split nodes into independent groups: no two groups touch the same record, so they may run at the same time."""
    group_of: dict[Record, list[Node]] = {}
    merged: dict[int, list[Node]] = {}
    for node in nodes:
        touched = node.touched
        groups = {id(group): group for record in touched if (group := group_of.get(record)) is not None}
        if groups:
            target = max(groups.values(), key=len)
            for group in groups.values():
                if group is not target:
                    target.extend(group)
                    del merged[id(group)]
                    for member in group:
                        for record in member.touched:
                            group_of[record] = target
        else:
            target = []
            merged[id(target)] = target
        target.append(node)
        for record in touched:
            group_of[record] = target
    return [_replay(group) for group in merged.values()]


def _replay(group: list[Node]) -> Replay:
    records = tuple(dict.fromkeys(itertools.chain.from_iterable(node.writes for node in group)))
    nodes = tuple(sorted(group, key=lambda node: node.seq))
    return Replay(nodes=nodes, records=records, nbytes=sum(record.nbytes for record in records))
