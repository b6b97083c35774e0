"""``*.index.json``: which shard file holds which key.

The names in an index come from whoever wrote the checkpoint, so a shard file must lie within the index's folder: no
``..``, no absolute path, no drive, no device, and no symbolic link that leads out of the folder. The links that
huggingface_hub's own cache is made of (from ``snapshots/<commit>/`` into ``blobs/`` beside it) are fine.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from weightlift.checkpoint.files import opened, read_exactly
from weightlift.checkpoint.sniff import sniff
from weightlift.errors import CheckpointError, Problem

MAX_INDEX_BYTES = 100_000_000
"""An index longer than this is refused: ten times that of a checkpoint of 91,000 tensors is a tenth of it."""

_DRIVE = re.compile(r"[A-Za-z]:")
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_SUMMARY = "not a valid checkpoint index"


@dataclass(frozen=True, slots=True)
class Index:
    """A read index: the shard file of each key, and the files, sorted by name."""

    path: Path
    weight_map: Mapping[str, Path]
    files: tuple[Path, ...]


def read_index(path: Path) -> Index:
    """Read and check an index; the shard files' contents are not looked at.

    Raises `CheckpointError` with every problem, `CheckpointNotFound` when there is no such index.
    """
    weight_map, problems = _weight_map(path)
    files: dict[str, Path] = {}
    for name in dict.fromkeys(weight_map.values()):
        where = member(path, name)
        if isinstance(where, Problem):
            problems.append(where)
        else:
            files[name] = where
    if problems:
        raise CheckpointError(_SUMMARY, problems)
    resolved = {key: files[name] for key, name in weight_map.items()}
    return Index(path, MappingProxyType(resolved), tuple(sorted(set(files.values()))))


def _fail(path: Path, what: str, **more: Any) -> NoReturn:
    raise CheckpointError(_SUMMARY, [Problem(what, file=path, **more)])


def _weight_map(path: Path) -> tuple[dict[str, str], list[Problem]]:
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return made

    raw = _bytes(path)
    try:
        index = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        sniffed = sniff(raw[:512])
        if sniffed is not None and sniffed.kind != "json":
            _fail(path, f"is {sniffed.found}, not an index", hint=sniffed.hint)
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        _fail(path, f"is not valid JSON: {what}")
    if not isinstance(index, dict):
        _fail(path, "is not an object", expected="an object with a weight_map", found=type(index).__name__)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = ", ".join(map(repr, list(index)[:5])) if weight_map is None else f"{weight_map!r:.60}"
        _fail(
            path, "has no weight_map", expected="a weight_map from keys to file names", found=found or "an empty object"
        )
    problems = [Problem("the index has the key twice", key=key, file=path, expected="unique keys") for key in twice]
    for key, name in weight_map.items():
        if not isinstance(name, str):
            problems.append(
                Problem(
                    "the index names no file for the key",
                    key=key,
                    file=path,
                    expected="a file name",
                    found=f"{name!r:.60}",
                )
            )
    return {key: name for key, name in weight_map.items() if isinstance(name, str)}, problems


def _bytes(path: Path) -> bytes:
    with opened(path) as (stream, status):
        if status.st_size > MAX_INDEX_BYTES:
            _fail(
                path,
                "is too long for an index",
                expected=f"at most {MAX_INDEX_BYTES} bytes",
                found=f"{status.st_size} bytes",
            )
        return read_exactly(stream, path, 0, status.st_size)


def member(index: Path, name: str) -> Path | Problem:
    """The path of a shard file, or why the index may not name it."""
    why = _unsafe(name)
    if why is not None:
        return _outside(index, name, why)
    folder = index.parent
    path = folder / posixpath.normpath(name)
    try:
        real = Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError):
        hint = "download it, or use the index that belongs to these files"
        return Problem(
            f"the index names a missing file, {name!r}", file=index, expected=str(path), found="no such file", hint=hint
        )
    home = Path(os.path.realpath(folder))
    if not real.is_file():
        return _outside(index, name, "it is not a regular file")
    if not (real.is_relative_to(home) or _hub_blob(home, real)):
        return _outside(index, name, f"it is a link to {real}")
    return path


def _unsafe(name: str) -> str | None:
    """Why a name cannot be that of a shard file on any system; None if it can."""
    parts = name.split("/")
    if not name or "\0" in name:
        return "it is not a file name"
    if "\\" in name:
        return "it has a backslash"
    if _DRIVE.match(name):
        return "it names a drive"
    if name.startswith(("/", "~")):
        return "it is an absolute path"
    if ".." in parts:
        return "it leads out of the folder"
    if any(_RESERVED.fullmatch(part) for part in parts):
        return "it names a device"
    return None


def _outside(index: Path, name: str, why: str) -> Problem:
    return Problem(
        f"the index names {name!r:.200}, which is not allowed: {why}",
        file=index,
        expected="a file within the folder of the index",
        hint="do not trust this checkpoint; or if it is yours, put the files beside the index",
    )


def _hub_blob(home: Path, real: Path) -> bool:
    """Whether ``real`` is a blob of the hub cache that ``home`` is a snapshot of."""
    return any(folder.name == "snapshots" and real.parent == folder.parent / "blobs" for folder in home.parents)
