"""``weightlift inspect``: what a checkpoint holds, from its headers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weightlift.cli.arguments import add_checkpoint, opened, positive
from weightlift.visible import visible

if TYPE_CHECKING:
    from weightlift import Checkpoint, TensorEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_checkpoint(parser)
    parser.add_argument(
        "--depth", type=positive, default=1, metavar="N", help="sum up prefixes of N names (default: 1)"
    )
    parser.add_argument("--all", action="store_true", help="a line for every key, repeated layers too")
    parser.add_argument("--json", action="store_true", help="print JSON: every key with file and range, or the error")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, or JSON."""
    found = opened(arguments)
    if arguments.json:
        print(json.dumps(_as_json(found, arguments.depth), indent=2))
    else:
        _print(found, arguments.depth, fold=not arguments.all)
    return 0


def _print(found: Checkpoint, depth: int, *, fold: bool) -> None:
    from weightlift.cli.output import add, console, shape_text, table
    from weightlift.plan.report import human_bytes

    out = console()
    size = f"{_count(len(found), 'tensor')}, {human_bytes(found.total_bytes)}"
    out.print(f"{visible(found.source)}: {size}", soft_wrap=True)
    for key, value in found.metadata.items():
        line = f"  metadata {key}: {value if len(value) <= 100 else value[:99] + '…'}"
        out.print(visible(line), style="dim", soft_wrap=True)
    files = table("file", "format", ">tensors", ">bytes", ">on disk", "dtypes")
    for row in _files(found):
        add(files, row["name"], row["format"], row["tensors"], human_bytes(row["bytes"]),
            human_bytes(row["size"]), _dtypes(row["dtypes"]))  # fmt: skip
    prefixes = table("prefix", ">tensors", ">elements", ">bytes", "dtypes")
    for row in _prefixes(found.values(), depth):
        add(prefixes, row["prefix"], row["tensors"], f"{row['elements']:,}", human_bytes(row["bytes"]),
            _dtypes(row["dtypes"]))  # fmt: skip
    keys = table("key", "", "shape", "dtype", ">bytes", "file")
    for name, entries in _folded(found, fold=fold):
        first = entries[0]
        where = sorted({piece.file.name for entry in entries for piece in entry.pieces if piece.file is not None})
        add(keys, name, f"×{len(entries)}" if len(entries) > 1 else "", shape_text(first.shape), _short(first.dtype),
            human_bytes(sum(entry.nbytes for entry in entries)),
            where[0] if len(where) == 1 else _count(len(where), "file"))  # fmt: skip
    for part in (files, prefixes, keys):
        if part.row_count:
            out.print()
            out.print(part)
    if found.extras:
        out.print(f"\nnot tensors: {visible(', '.join(found.extras))}", soft_wrap=True)


def _as_json(found: Checkpoint, depth: int) -> dict[str, Any]:
    return {
        "source": found.source,
        "tensors": [
            {
                "key": entry.key,
                "shape": list(entry.shape),
                "dtype": _short(entry.dtype),
                "bytes": entry.nbytes,
                "file": None if entry.file is None else str(entry.file),
                "range": [entry.start, entry.end],
                **_chunks(entry),
            }
            for entry in found.values()
        ],
        "files": list(_files(found)),
        "prefixes": _prefixes(found.values(), depth),
        "extras": list(found.extras),
        "metadata": dict(found.metadata),
        "total_bytes": found.total_bytes,
    }


def _chunks(entry: TensorEntry) -> dict[str, Any]:
    """The boxes of a tensor that was written in several, which has no file and no range of its own."""
    chunks = [
        {
            "offsets": list(offsets),
            "shape": list(chunk.shape),
            "file": str(chunk.file),
            "range": [chunk.start, chunk.end],
        }
        for offsets, chunk in entry.chunks
    ]
    return {"chunks": chunks} if chunks else {}


def _files(found: Checkpoint) -> Iterable[dict[str, Any]]:
    held: dict[Any, list[TensorEntry]] = {}
    for entry in found.values():
        for piece in entry.pieces:
            held.setdefault(piece.file, []).append(piece)
    for file in found.files:
        entries = held.get(file.path, [])
        yield {
            "name": file.path.name,
            "path": str(file.path),
            "format": file.format,
            "size": file.size_bytes,
            **_sums(entries),
        }


def _prefixes(entries: Iterable[TensorEntry], depth: int) -> list[dict[str, Any]]:
    """Sums for the first ``depth`` names of the keys, the biggest first. A key that is no longer stands for itself."""
    groups: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        groups.setdefault(".".join(entry.key.split(".")[:depth]), []).append(entry)
    rows = [{"prefix": prefix, **_sums(members)} for prefix, members in groups.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def _sums(entries: list[TensorEntry]) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for entry in entries:
        dtypes[_short(entry.dtype)] = dtypes.get(_short(entry.dtype), 0) + entry.nbytes
    return {
        "tensors": len(entries),
        "elements": sum(entry.numel for entry in entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "dtypes": dtypes,
    }


def _folded(found: Checkpoint, *, fold: bool) -> list[tuple[str, list[TensorEntry]]]:
    """Entries by name, in natural order; those that differ only in the numbers of their key as one."""
    from weightlift.folding import folded, unnumbered

    ordered = sorted(found.values(), key=lambda entry: _natural(entry.key))
    if not fold:
        return [(entry.key, [entry]) for entry in ordered]
    groups: dict[tuple[object, ...], list[TensorEntry]] = {}
    for entry in ordered:
        groups.setdefault((unnumbered(entry.key), entry.shape, entry.dtype), []).append(entry)
    return [(folded(entry.key for entry in group)[0][0], group) for group in groups.values()]


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in key.split(".")]


def _dtypes(sizes: dict[str, int]) -> str:
    return ", ".join(sorted(sizes, key=lambda name: -sizes[name]))


def _short(dtype: object) -> str:
    from weightlift.plan.report import short_dtype

    return short_dtype(dtype)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
