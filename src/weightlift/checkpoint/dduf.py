"""DDUF: a pipeline of several models in one zip whose records are stored as they are. Headers only.

Refused is all that ``huggingface_hub.read_dduf_file`` refuses (compressed records, other suffixes, more than one level
of folders, folders that ``model_index.json`` doesn't name or that hold no configuration) and what it doesn't look at:
names that lead out of the archive, names twice, records that overlap or whose own headers disagree with the directory,
encryption, end records that don't describe the file, and (of what is no tensor) content with another checksum.
"""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from weightlift.checkpoint.entry import ShardContents, ShardFile
from weightlift.checkpoint.files import opened, read_exactly, shard_file
from weightlift.checkpoint.reader import require_unchanged
from weightlift.checkpoint.safetensors import read_safetensors
from weightlift.checkpoint.stored_zip import StoredZip, damage_told
from weightlift.errors import CheckpointError, Problem

INDEX = "model_index.json"
WEIGHTS = ".safetensors"
_SUMMARY = "not a valid DDUF file"
_SUFFIXES = (".json", ".model", WEIGHTS, ".txt")
_CONFIGURATIONS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "scheduler_config.json")


@dataclass(frozen=True, slots=True)
class ArchivedFile:
    """One file within an archive: the half-open byte range in the archive's file, and its checksum (CRC-32)."""

    name: str
    archive: ShardFile
    start: int
    end: int
    crc: int


@dataclass(frozen=True, slots=True)
class DdufArchive:
    """What is in a DDUF file, by name, in the order of its directory; nothing stays open."""

    file: ShardFile
    members: Mapping[str, ArchivedFile]

    def read(self, name: str) -> bytes:
        """The content of a member, its checksum compared. Raises KeyError, `CheckpointError`, `CheckpointChanged`."""
        member = self.members[name]
        path = self.file.path
        with opened(path) as (stream, status):
            require_unchanged(self.file, status)
            return _content(stream, member)

    def weights(self) -> dict[str, ArchivedFile]:
        """The members that hold tensors."""
        return {name: member for name, member in self.members.items() if name.endswith(WEIGHTS)}


def read_dduf(path: Path) -> DdufArchive:
    """The members of a DDUF file. Raises `CheckpointError` with every problem, `CheckpointNotFound`."""
    with opened(path) as (stream, status):
        with damage_told(path, status.st_size, _SUMMARY):
            archive = _Archive(path, stream, status.st_size)
        file = shard_file(path, "dduf", status)
        members = {}
        for name, info in archive.records.items():
            where = archive.range(name)
            assert not isinstance(where, Problem)
            members[name] = ArchivedFile(name, file, *where, info.CRC)
        _check_structure(path, members, _content(stream, members[INDEX]))
        return DdufArchive(file, MappingProxyType(members))


class _Archive(StoredZip):
    """The records of a DDUF file by their names."""

    def __init__(self, path: Path, stream: io.FileIO, size: int) -> None:
        super().__init__(
            path,
            stream,
            size,
            summary=_SUMMARY,
            packed_hint="it was packed by another tool; write it with huggingface_hub's export_folder_as_dduf",
        )
        problems = []
        for info in self.infos:
            wrong = _wrong_name(info.orig_filename)
            if wrong is None and info.volume != 0:
                wrong = "is on another volume"
            if wrong is None and info.filename in self.records:
                wrong = "is there twice"
            if wrong is not None:
                problems.append(Problem(f"the record {info.orig_filename!r} {wrong}", file=path))
            else:
                self.records[info.filename] = info
        if INDEX not in self.records:
            problems.append(Problem(f"the record {INDEX!r} is missing", file=path, hint="is it a DDUF file?"))
        ranges = {name: self.range(name) for name in self.records}
        problems += [where for where in ranges.values() if isinstance(where, Problem)]
        problems += self._overlaps({name: where for name, where in ranges.items() if not isinstance(where, Problem)})
        if problems:
            raise CheckpointError(_SUMMARY, problems)

    def _overlaps(self, ranges: Mapping[str, tuple[int, int]]) -> Iterator[Problem]:
        """Records that begin, with their headers, before another one ends."""
        reached, before = 0, ""
        for begin, end, name in sorted(
            (self.records[name].header_offset, end, name) for name, (_, end) in ranges.items()
        ):
            if begin < reached:
                yield Problem(f"the record {name!r} overlaps {before!r}", file=self.path, start=begin, end=reached)
            if end > reached:
                reached, before = end, name


def _wrong_name(name: str) -> str | None:
    """What speaks against the name of a record; None: nothing."""
    parts = name.split("/")
    if "\\" in name or "\0" in name:
        return "has a character in its name that no member has"
    if not name.endswith(_SUFFIXES):
        return f"is none of {', '.join(_SUFFIXES)}"
    if len(parts) > 2:
        return "is in a folder within a folder, or has an absolute name"
    if any(part in ("", ".", "..") or part.strip() != part for part in parts):
        return "has a name that leads elsewhere"
    return None


def _check_structure(path: Path, members: Mapping[str, ArchivedFile], index_text: bytes) -> None:
    problems = []
    try:
        index = json.loads(index_text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_SUMMARY, [Problem(f"{INDEX} is not JSON: {error}", file=path)]) from None
    if not isinstance(index, dict):
        raise CheckpointError(_SUMMARY, [Problem(f"{INDEX} is not an object", file=path)])
    for folder in dict.fromkeys(name.partition("/")[0] for name in members if "/" in name):
        if folder in members:
            problems.append(Problem(f"{folder!r} is a file and a folder", file=path))
        if folder not in index:
            problems.append(Problem(f"{INDEX} does not name the folder {folder!r}", file=path))
        if not any(f"{folder}/{name}" in members for name in _CONFIGURATIONS):
            expected = f"one of {', '.join(_CONFIGURATIONS)}"
            problems.append(Problem(f"the folder {folder!r} has no configuration", file=path, expected=expected))
    if problems:
        raise CheckpointError(_SUMMARY, problems)


def _content(stream: io.FileIO, member: ArchivedFile) -> bytes:
    """The bytes of a member, no more than the file has."""
    path = member.archive.path
    content = read_exactly(stream, path, member.start, member.end - member.start)
    if zlib.crc32(content) != member.crc:
        problem = Problem(
            f"the record {member.name!r} is damaged",
            file=path,
            start=member.start,
            end=member.end,
            expected=f"the checksum {member.crc:08x}",
            found=f"{zlib.crc32(content):08x}",
        )
        raise CheckpointError(_SUMMARY, [problem])
    return content


def read_member(member: ArchivedFile) -> ShardContents:
    """The header of a safetensors file within an archive; byte ranges are those of the archive's file."""
    return read_safetensors(member.archive.path, within=(member.start, member.end), known=member.archive)


# -- members in the place of files ------------------------------------------------------------------------------------

_standing: ContextVar[Mapping[Path, ArchivedFile]] = ContextVar("weightlift.dduf_members", default=MappingProxyType({}))


@contextlib.contextmanager
def standing_for(members: Mapping[Path, ArchivedFile]) -> Iterator[None]:
    """In this context, opening one of the paths opens the member: for libraries that look for files by their names."""
    token = _standing.set({**_standing.get(), **members})
    try:
        yield
    finally:
        _standing.reset(token)


def member_at(path: Path) -> ArchivedFile | None:
    """The member that stands for a path in this context."""
    return _standing.get().get(path)
