"""Running what was recorded: which calls depend on one another, and which may run at the same time."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from weightlift.deferred.tape import Node, Operation, Record, live_readers


def needed(records: Iterable[Record], supplied: Collection[Record] = ()) -> list[Node]:
    """The nodes that must run to give ``records`` their values, in order: see `Walk`."""
    return Walk(supplied).needed(records)


def _turn(node: Node) -> int:
    return node.seq


class Walk:
    """Finds nodes that must run before others, each once, however often it is asked.

    ``supplied`` are records whose values come from elsewhere: no node is run for their sake. ``readers``: also those
    that have to read what one of the nodes overwrites, if somebody still holds their results.
    """

    def __init__(self, supplied: Collection[Record] = (), *, readers: bool = True) -> None:
        self._supplied = supplied
        self._readers = readers
        self._known: set[Node] = set()
        # A record may have thousands of writers and readers: which of these live, and up to which turn they are told.
        self._live: dict[Record, list[Operation]] = {}
        self._told: dict[Record, int] = {}

    def needed(self, records: Iterable[Record]) -> list[Node]:
        """The nodes that must run to give ``records`` their values, in order."""
        return self.needed_by(record.last for record in records if record.pending)

    def needed_by(self, nodes: Iterable[Node | None]) -> list[Node]:
        """These nodes and those that must run before, in order."""
        found: list[Node] = []
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node is None or node.done or node in self._known:
                continue
            self._known.add(node)
            found.append(node)
            stack.extend(version for _, version in node.deps)
            for record in node.writes if self._readers else ():
                stack.extend(self._readers_before(node, record))
        return sorted(found, key=_turn)

    def _readers_before(self, writer: Node, record: Record) -> list[Operation]:
        """Live unexecuted nodes that have to read ``record`` before ``writer`` changes it and were not told before."""
        told = self._told.get(record, 0)
        if record.readers is None or writer.seq <= told:
            return []
        self._told[record] = writer.seq
        live = self._live.get(record)
        if live is None:
            live = self._live[record] = sorted(live_readers(record), key=_turn)
        new = live[bisect.bisect(live, told, key=_turn) : bisect.bisect_left(live, writer.seq, key=_turn)]
        return [node for node in new if not all(target in self._supplied for target in node.writes)]


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
