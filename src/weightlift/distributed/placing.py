"""Which mesh axis shards which tensor, where there is no process group to ask: from the user, or from usual names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightlift.distributed.layout import Split, splits_of
from weightlift.patterns import Patterns

Placements = Mapping[str, Sequence[Any]] | Callable[[str, tuple[int, ...]], Sequence[Any]] | None
MeshShape = Mapping[str, int] | Sequence[int]

Placer = Callable[[str, tuple[int, ...], str, tuple[int, ...]], tuple[Split, ...]]
"""A function (name, shape, kind, coordinate) → splits of that rank."""

_MOST_RANKS = 1 << 20  # each costs time and memory

# How an axis of this name shards, where placements are not given.
_BY_ROWS = ("fsdp", "shard", "dp_shard", "zero")
_COPIES = ("dp", "ddp", "replicate", "dp_replicate")
_TENSOR = ("tp",)
_EXPERTS = ("ep",)

_COLUMN_WISE = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "q_b_proj", "kv_b_proj",
    "wq", "wk", "wv", "w1", "w3", "fc1", "c_fc", "query", "key", "value", "embed_tokens", "lm_head",
)  # fmt: skip
_ROW_WISE = ("o_proj", "down_proj", "wo", "w2", "fc2", "out_proj")


@dataclass(frozen=True, slots=True)
class Mesh:
    """A mesh on paper: names and sizes of its axes, the slowest first, as torch's ``DeviceMesh`` numbers ranks."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, shape: MeshShape) -> Mesh:
        """From a mapping of names to sizes, or sizes alone. Raises ValueError for sizes that can't be."""
        if isinstance(shape, Mapping):
            names, sizes = tuple(map(str, shape)), tuple(shape.values())
        else:
            sizes = tuple(shape) if isinstance(shape, Sequence) else ()
            names = tuple(f"axis {number}" for number in range(len(sizes)))
        if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"mesh_shape must be positive sizes, as in (16, 8), or names with sizes, found {shape!r}")
        if math.prod(sizes) > _MOST_RANKS:
            raise ValueError(f"a mesh of {math.prod(sizes):,} ranks; at most {_MOST_RANKS:,} can be worked out")
        return cls(names, sizes)

    def __str__(self) -> str:
        return " × ".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))


def placer(mesh: Mesh, placements: Placements, *, named: bool) -> Placer:
    """What places tensors on a mesh.

    ``placements`` maps patterns of names to one torch placement an axis, or is a function of name and shape; what no
    pattern matches is replicated. None goes by the names of the axes (``named``), or shards every dim 0 over all axes.
    Raises ValueError for an axis of unknown name.
    """
    if placements is None:
        return _by_names(mesh, named=named)
    by_pattern = None if callable(placements) else Patterns(placements)

    def given(name: str, shape: tuple[int, ...], kind: str, coordinate: tuple[int, ...]) -> tuple[Split, ...]:
        found: Sequence[Any] | None = None
        if callable(placements):
            found = placements(name, shape)
        elif by_pattern is not None and (pattern := by_pattern.first([name])) is not None:
            found = by_pattern[pattern]
        if found is None:
            return ()
        if len(found) != len(mesh.sizes):
            raise ValueError(f"placements of {name}: {len(found)} for a mesh of {len(mesh.sizes)} axes")
        return tuple(splits_of(found, mesh.sizes, coordinate, len(shape)))

    return given


def _by_names(mesh: Mesh, *, named: bool) -> Placer:
    known = (*_BY_ROWS, *_COPIES, *_TENSOR, *_EXPERTS)
    unknown = [name for name in mesh.names if named and name not in known]
    if unknown:
        text = f"no axis is known by the name {', '.join(unknown)}"
        raise ValueError(f"{text}; give placements, or use {', '.join(known)}")
    rows = [not named or name in _BY_ROWS for name in mesh.names]

    def usual(name: str, shape: tuple[int, ...], kind: str, coordinate: tuple[int, ...]) -> tuple[Split, ...]:
        if kind == "buffer" or not shape:
            return ()
        dims = [0 if by_row else _dim_of(axis, name, shape) for axis, by_row in zip(mesh.names, rows, strict=True)]
        splits = []
        for axis, dim in enumerate(dims):
            if dim is None:
                continue
            # FSDP shards what the axes after it have sharded: their pieces are interleaved.
            factor = 1
            if named and rows[axis]:
                for other in range(axis + 1, len(dims)):
                    if dims[other] == dim and not rows[other]:
                        factor *= mesh.sizes[other]
            splits.append(Split(dim, mesh.sizes[axis], coordinate[axis], factor))
        return tuple(splits)

    return usual


def _dim_of(axis: str, name: str, shape: tuple[int, ...]) -> int | None:
    """The dim that an axis of this name shards, by what models usually call their layers."""
    if axis in _EXPERTS:
        return 0 if "experts" in name and len(shape) == 3 else None
    if axis not in _TENSOR:
        return None
    words = name.split(".")
    owner = words[-2] if len(words) > 1 else words[-1]
    if words[-1] in (*_COLUMN_WISE, *_ROW_WISE):
        owner = words[-1]  # fused experts are parameters themselves: (experts, out, in)
    if owner in _COLUMN_WISE:
        return len(shape) - 2 if len(shape) > 1 else 0
    if owner in _ROW_WISE and len(shape) > 1:
        return len(shape) - 1
    return None
