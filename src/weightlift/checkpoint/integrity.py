"""Is the content of a file what it should be? Hashes that somebody else wrote down, and comparing with them.

Three places are asked, in this order: the name of the blob in the hub's cache (a sha256, or git's sha1 of small files);
the metadata that huggingface_hub leaves beside a download into a local folder; a line of ``SHA256SUMS`` in the file's
folder, as ``sha256sum *.safetensors* > SHA256SUMS`` and `weightlift.save` with ``manifest=True`` write it.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weightlift.checkpoint.entry import ShardFile
from weightlift.checkpoint.files import opened, os_errors, read_exactly, short_read
from weightlift.errors import CheckpointCorrupt, CheckpointError, LoadCancelled, Problem

MANIFEST = "SHA256SUMS"
_MAX_MANIFEST_BYTES = 10_000_000
_BLOCK_BYTES = 1 << 20
_UNKNOWN = "cannot check the content of the checkpoint"
_LINES = (
    re.compile(r"(?P<escaped>\\?)(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)"),  # an odd name is escaped
    # BSD's sha256 and `sha256sum --tag`; and what openssl writes.
    re.compile(r"(?P<escaped>\\?)SHA(2-)?256 ?\((?P<name>.+)\) ?= (?P<digest>[0-9a-fA-F]{64})"),
)
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what a shell of Windows redirects to
_ALGORITHMS: Mapping[int, Literal["sha256", "git-sha1"]] = {64: "sha256", 40: "git-sha1"}


@dataclass(frozen=True, slots=True)
class Digest:
    """The hash that a file should have, and who says so."""

    algorithm: Literal["sha256", "git-sha1"]
    value: str
    told_by: str


def expected_digest(path: Path) -> Digest | None:
    """The hash that is written down for a file, if one is. Raises `CheckpointError` for an unreadable manifest."""
    return _of_blob(path) or _of_download(path) or _of_manifest(path)


def expected_digests(paths: Iterable[Path]) -> dict[Path, Digest]:
    """The hash of every file. Raises one `CheckpointError` that names the files for which none is written down."""
    found: dict[Path, Digest] = {}
    problems = []
    for path in paths:
        digest = expected_digest(path)
        if digest is None:
            command = f"sha256sum {shlex.quote(path.name)} >> {MANIFEST}"
            problems.append(
                Problem(
                    "no hash is written down for this file, so its content cannot be checked",
                    file=path,
                    expected=f"a hub cache that names its blobs by hash, or a line in {path.parent / MANIFEST}",
                    hint=f"write one with `{command}` where the file is known to be good",
                )
            )
        else:
            found[path] = digest
    if problems:
        raise CheckpointError(_UNKNOWN, problems)
    return found


def digests_of(files: Iterable[ShardFile], index: Path | None) -> dict[Path, Digest]:
    """The hashes to compare the files with while they are read; an index is small and compared now."""
    if index is not None:
        require_content((), index)
    return expected_digests(file.path for file in files)


def content_digest(
    readinto: Callable[[memoryview, int], int],
    path: Path,
    size_bytes: int,
    digest: Digest,
    cancel: threading.Event | None = None,
) -> str:
    """The hash of ``size_bytes`` bytes, read in order. Raises `CheckpointError` at an early end, `LoadCancelled`."""
    state = _state(digest, size_bytes)
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, max(size_bytes, 1))))
    done = 0
    while done < size_bytes:
        if cancel is not None and cancel.is_set():
            raise LoadCancelled
        count = readinto(buffer[: size_bytes - done], done)
        if count <= 0:
            raise short_read(path, 0, size_bytes, done)
        state.update(buffer[:count])
        done += count
    return str(state.hexdigest())


def difference(path: Path, digest: Digest, found: str) -> Problem | None:
    """What is wrong with a file of that hash, if anything is."""
    if found == digest.value:
        return None
    return Problem(
        "the content of the file is not what it should be",
        file=path,
        expected=f"{digest.algorithm} {digest.value}, by {digest.told_by}",
        found=found,
        hint="the file was damaged or changed: fetch it again",
    )


def check_files(paths: Iterable[Path]) -> tuple[Problem, ...]:
    """Hash files in the calling thread; everything that is wrong, files without a known hash included."""
    return _looked_at(paths)[0]


def _looked_at(paths: Iterable[Path]) -> tuple[tuple[Problem, ...], bool]:
    """All problems, and whether the content of any file is another than its hash says."""
    problems: list[Problem] = []
    corrupt = False
    for path in paths:
        try:
            digest = expected_digests([path])[path]
            problem = difference(path, digest, _hash(path, digest))
        except CheckpointError as error:
            problems += error.problems
            continue
        if problem is not None:
            problems.append(problem)
            corrupt = True
    return tuple(problems), corrupt


def require_content(files: Iterable[ShardFile], index: Path | None) -> None:
    """Hash the files of a checkpoint and its index. Raises `CheckpointCorrupt` with every problem if the content of one
    is another, and `CheckpointError` if it is only not known for some, or can't be read."""
    paths = [file.path for file in files] + ([index] if index is not None else [])
    problems, corrupt = _looked_at(paths)
    if corrupt:
        raise CheckpointCorrupt("the content of the checkpoint is not what it should be", problems)
    if problems:
        raise CheckpointError(_UNKNOWN, problems)


def _hash(path: Path, digest: Digest) -> str:
    with opened(path) as (stream, status):

        def readinto(buffer: memoryview, offset: int) -> int:
            return stream.readinto(buffer) or 0

        return content_digest(readinto, path, status.st_size, digest)


def _state(digest: Digest, size_bytes: int) -> Any:
    if digest.algorithm == "sha256":
        return hashlib.sha256(usedforsecurity=False)
    return hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)


def _of_blob(path: Path) -> Digest | None:
    """From the name of a blob of the hub's cache that the file is a link to."""
    with os_errors(path):
        real = path.resolve()
    if real.parent.name != "blobs" or not re.match(r"(models|datasets|spaces)--", real.parent.parent.name):
        return None
    return _digest(real.name, "the name of its blob in the hub's cache")


def _of_download(path: Path) -> Digest | None:
    """From what ``hf download --local-dir`` notes: commit, etag and time, a line each. The notes on all files lie in
    the folder of the download, which is one further up for a component of a pipeline."""
    for folder in path.parents:
        name = f"{path.relative_to(folder)}.metadata"
        note = folder / ".cache" / "huggingface" / "download" / name
        try:
            lines = note.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        return _digest(lines[1].strip(), str(note)) if len(lines) >= 2 else None
    return None


def _digest(text: str, told_by: str) -> Digest | None:
    algorithm = _ALGORITHMS.get(len(text))
    if algorithm is None or not re.fullmatch(r"[0-9a-f]+", text):
        return None
    return Digest(algorithm, text, told_by)


def _of_manifest(path: Path) -> Digest | None:
    value = read_manifest(path.parent).get(path.name)
    return None if value is None else Digest("sha256", value, str(path.parent / MANIFEST))


def read_manifest(folder: Path) -> dict[str, str]:
    """File name → sha256, from ``SHA256SUMS``; empty where there is none. Raises `CheckpointError` for another form."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    with opened(path) as (stream, status):
        size = min(status.st_size, _MAX_MANIFEST_BYTES)
        raw = read_exactly(stream, path, 0, size)
    text = raw.decode("utf-16", "replace") if raw[:2] in _UTF_16 else raw.decode("utf-8-sig", "surrogateescape")
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        match = next(filter(None, (form.fullmatch(line.rstrip()) for form in _LINES)), None)
        if match is None:
            if line.strip() and not line.startswith("#"):
                expected = "a sha256, two spaces and a file name, or SHA256 (name) = sha256"
                what = f"line {number} is not of the form that sha256sum writes"
                problem = Problem(what, file=path, expected=expected, found=repr(line[:100]))
                raise CheckpointError("cannot read the manifest", [problem])
            continue
        name = match["name"]
        if match["escaped"]:
            name = re.sub(r"\\[\\nr]", lambda escape: _ESCAPES[escape[0]], name)
        name = name.removeprefix("./")
        value = match["digest"].lower()
        if found.setdefault(name, value) != value:
            problem = Problem(f"line {number} gives another hash for {name!r} than a line before", file=path)
            raise CheckpointError("cannot read the manifest", [problem])
    return found


def manifest_text(sums: Mapping[str, str]) -> bytes:
    """The content of ``SHA256SUMS``, as sha256sum writes it."""
    lines = []
    for name, digest in sorted(sums.items()):
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n")
    return "".join(lines).encode("utf-8", "surrogateescape")
