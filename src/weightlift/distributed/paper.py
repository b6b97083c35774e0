"""A load on any number of ranks, worked out from headers: who reads and holds how much. No process group, no ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightlift.checkpoint import Checkpoint
from weightlift.checkpoint.entry import TensorEntry
from weightlift.distributed.fill import row_parts
from weightlift.distributed.layout import Box, Layout, coordinates
from weightlift.distributed.placing import Mesh, MeshShape, Placements, placer
from weightlift.plan.parts import local_parts, part
from weightlift.plan.records import Action, Decisions, Part
from weightlift.plan.regions import whole
from weightlift.plan.report import human_bytes
from weightlift.strides import row_major
from weightlift.transfer.combs import cost


@dataclass(frozen=True, slots=True)
class Wanted:
    """One value of the module: its name, its shape and dtype when loaded, what it is made of (nothing: missing)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class RankCost:
    """What one rank does. ``requests`` are byte ranges of files; neighbours that share a read count apart."""

    rank: int
    coordinate: tuple[int, ...]
    memory_bytes: int
    read_bytes: int
    requests: int
    files: int


@dataclass(frozen=True, slots=True)
class FileCost:
    """What all ranks together ask of one file."""

    path: Path
    size_bytes: int
    read_bytes: int
    requests: int
    ranks: int


@dataclass(frozen=True, slots=True)
class MeshReport:
    """The load of a checkpoint by every rank of a mesh. ``str()`` is a table."""

    mesh: Mesh
    ranks: tuple[RankCost, ...]
    files: tuple[FileCost, ...]
    checkpoint_bytes: int
    result_bytes: int
    sent_bytes: int
    """What rank 0 would send with ``source_rank=0``: loaded values that the others hold."""

    @property
    def read_bytes(self) -> int:
        """Bytes that all ranks together read."""
        return sum(rank.read_bytes for rank in self.ranks)

    def __str__(self) -> str:
        count = len(self.ranks)
        lines = [f"mesh {self.mesh}: {count:,} rank{'s' * (count != 1)}", ""]
        lines += _table(self.ranks)
        ratio = self.read_bytes / self.checkpoint_bytes if self.checkpoint_bytes else 0.0
        requests = sum(rank.requests for rank in self.ranks)
        lines += [
            "",
            f"all ranks read {human_bytes(self.read_bytes)}, {ratio:.2f}× the {human_bytes(self.checkpoint_bytes)} that"
            f" are loaded, in {requests:,} requests to {len(self.files):,} files",
        ]
        if self.files:
            busiest = max(self.files, key=lambda file: file.requests)
            lines.append(
                f"the busiest file, {busiest.path.name}: {busiest.requests:,} requests,"
                f" {human_bytes(busiest.read_bytes)} for {busiest.ranks:,} ranks"
            )
        lines.append(
            f"source_rank=0 instead: one rank reads {human_bytes(self.checkpoint_bytes)} and sends"
            f" {human_bytes(self.sent_bytes)}"
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return {
            "mesh": dict(zip(self.mesh.names, self.mesh.sizes, strict=True)),
            "read_bytes": self.read_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "result_bytes": self.result_bytes,
            "sent_bytes": self.sent_bytes,
            "ranks": [
                {
                    "rank": rank.rank,
                    "coordinate": list(rank.coordinate),
                    "memory_bytes": rank.memory_bytes,
                    "read_bytes": rank.read_bytes,
                    "requests": rank.requests,
                    "files": rank.files,
                }
                for rank in self.ranks
            ],
            "files": [
                {
                    "path": str(file.path),
                    "bytes": file.size_bytes,
                    "read_bytes": file.read_bytes,
                    "requests": file.requests,
                    "ranks": file.ranks,
                }
                for file in self.files
            ],
        }


def _table(ranks: Sequence[RankCost]) -> list[str]:
    rows = [("per rank", "least", "mean", "most")]
    for title, name, text in (
        ("memory", "memory_bytes", human_bytes),
        ("read", "read_bytes", human_bytes),
        ("requests", "requests", _count),
        ("files", "files", _count),
    ):
        values = [getattr(rank, name) for rank in ranks]
        rows.append((title, text(min(values)), text(sum(values) / len(values)), text(max(values))))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def on_mesh(decisions: Decisions, mesh_shape: MeshShape, placements: Placements) -> MeshReport:
    """What every rank of a mesh does for a plan. Raises ValueError for a mesh or placements that can't be."""
    sizes = {file.path: file.size_bytes for file in decisions.files}
    return work_out(wanted_by(decisions), sizes, mesh_shape, placements)


def on_mesh_alone(checkpoint: Checkpoint, mesh_shape: MeshShape, placements: Placements = None) -> MeshReport:
    """As `on_mesh`, for a checkpoint without a module."""
    sizes = {file.path: file.size_bytes for file in checkpoint.files}
    return work_out(wanted_of(checkpoint), sizes, mesh_shape, placements)


def wanted_by(decisions: Decisions) -> list[Wanted]:
    """The values of a plan: one a target, as ties are read and held once. What is no strided tensor has no bytes that
    its shape tells of, and is left out."""
    found: dict[int, Wanted] = {}
    for row in decisions.rows:
        loaded = row.action is Action.LOADED
        if (row.target not in found or loaded) and not row.unstrided:
            found[row.target] = Wanted(row.fqn, row.shape, row.dtype, row.kind, row_parts(row) if loaded else ())
    return list(found.values())


def wanted_of(entries: Mapping[str, TensorEntry]) -> list[Wanted]:
    """A checkpoint's own tensors, all of them parameters: what can be said without a module."""
    return [
        Wanted(key, entry.shape, entry.dtype, "parameter", (part(entry, whole(entry.shape)),))
        for key, entry in entries.items()
    ]


def work_out(
    wanted: Iterable[Wanted], sizes: Mapping[Path, int], mesh_shape: MeshShape, placements: Placements
) -> MeshReport:
    """What every rank of a mesh reads and holds. ``sizes`` are those of the files.

    Tensors of one shape that are placed alike cost a rank the same, so that each such class is worked out once.
    """
    mesh = Mesh.of(mesh_shape)
    splits_for = placer(mesh, placements, named=isinstance(mesh_shape, Mapping))
    places = list(coordinates(mesh.sizes))
    totals = _Totals(len(places))
    classes: dict[object, _Class] = {}
    for item in wanted:
        splits = tuple(splits_for(item.name, item.shape, item.kind, place) for place in (places[0], places[-1]))
        sources = tuple(
            (piece.shape, piece.stride, piece.offset, piece.entry.dtype, piece.entry.stride) for piece in item.parts
        )
        key = (item.shape, splits, item.dtype, sources)
        if key not in classes:
            layouts = [Layout(item.shape, splits_for(item.name, item.shape, item.kind, place)) for place in places]
            classes[key] = _Class.of(layouts, item)
        totals.add(item, classes[key])
    return totals.report(mesh, places, sizes)


@dataclass(frozen=True, slots=True)
class _Class:
    """What each rank pays for one tensor of a kind: bytes held, and for each part (bytes read, requests)."""

    memory: Any
    parts: tuple[tuple[Any, Any], ...]

    @classmethod
    def of(cls, layouts: Sequence[Layout], item: Wanted) -> _Class:
        memory = np.zeros(len(layouts), dtype=np.int64)
        parts = tuple((np.zeros_like(memory), np.zeros_like(memory)) for _ in item.parts)
        alone = len(item.parts) == 1 and item.parts[0].entry.shape == item.shape
        for rank, layout in enumerate(layouts):
            boxes = layout.boxes()
            memory[rank] = sum(box.numel for box in boxes) * item.dtype.itemsize
            for (read, requests), piece in zip(parts, item.parts, strict=True):
                for box in boxes:
                    for count, nbytes in _costs(piece, item.shape, box, alone=alone):
                        requests[rank] += count
                        read[rank] += nbytes
        return cls(memory, parts)


def _costs(piece: Part, shape: tuple[int, ...], box: Box, *, alone: bool) -> Iterator[tuple[int, int]]:
    """(requests, bytes) for a box of one part of a value. ``alone``: the part is the whole value."""
    entry = piece.entry
    if alone:
        yield cost(box.sizes, entry.stride or row_major(entry.shape), entry.dtype.itemsize)
        return
    for found in local_parts([piece], shape, start=box.start, size=box.sizes):
        stride = found.entry.stride or row_major(found.entry.shape)
        yield cost(found.entry.shape, stride, entry.dtype.itemsize)


class _Totals:
    """Sums over tensors, by rank and by file."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._memory = np.zeros(ranks, dtype=np.int64)
        self._of_file: dict[Path | None, tuple[Any, Any]] = {}
        self._checkpoint_bytes = 0
        self._result_bytes = 0
        self._sent_bytes = 0

    def add(self, item: Wanted, costs: _Class) -> None:
        """One more tensor."""
        self._memory += costs.memory
        self._result_bytes += item.dtype.itemsize * math.prod(item.shape)
        if item.parts:
            self._sent_bytes += int(costs.memory[1:].sum())
        for piece, (piece_read, piece_requests) in zip(item.parts, costs.parts, strict=True):
            self._checkpoint_bytes += piece.entry.nbytes
            path = piece.entry.file
            if path not in self._of_file:
                self._of_file[path] = (np.zeros_like(self._memory), np.zeros_like(self._memory))
            read, requests = self._of_file[path]
            read += piece_read
            requests += piece_requests

    def report(self, mesh: Mesh, places: Sequence[tuple[int, ...]], sizes: Mapping[Path, int]) -> MeshReport:
        """The frozen result."""
        zero = np.zeros(self._ranks, dtype=np.int64)
        read, requests, files = zero.copy(), zero.copy(), zero.copy()
        costs = []
        for path, (file_read, file_requests) in self._of_file.items():
            read += file_read
            requests += file_requests
            if path is not None:
                files += file_requests > 0
                asking = int((file_requests > 0).sum())
                costs.append(
                    FileCost(path, sizes.get(path, 0), int(file_read.sum()), int(file_requests.sum()), asking)
                )
        ranks = tuple(
            RankCost(rank, place, int(self._memory[rank]), int(read[rank]), int(requests[rank]), int(files[rank]))
            for rank, place in enumerate(places)
        )
        return MeshReport(mesh, ranks, tuple(costs), self._checkpoint_bytes, self._result_bytes, self._sent_bytes)
