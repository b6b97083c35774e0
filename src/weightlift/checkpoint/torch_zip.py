"""The zip format of ``torch.save``: byte ranges from the zip's directory, shapes from its pickle.

Tensor bytes are not read: each record is stored uncompressed, so a tensor is a range of the file.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

from weightlift.checkpoint.entry import ShardContents, TensorEntry
from weightlift.checkpoint.files import opened, shard_file
from weightlift.checkpoint.part import WHOLE, Part
from weightlift.checkpoint.sniff import FROM_NUMPY
from weightlift.checkpoint.stored_zip import StoredZip, Window, damage_told
from weightlift.checkpoint.torch_globals import StorageRef
from weightlift.checkpoint.torch_state import SUMMARY, StateDict, reader_for, unpickle, versions
from weightlift.errors import CheckpointError, Problem

_VERSIONS = range(1, 11)
_IDENTITY = ".data/serialization_id"  # made of all checksums
_TEXTS = ("byteorder", _IDENTITY)
_NUMBERS = ("version", ".data/version", ".format_version", ".storage_alignment")


def read_torch_zip(path: Path, part: Part = WHOLE) -> ShardContents:
    """The records of a file that ``torch.save`` wrote, in the order of its state dict, which is ``part`` of what lies
    there.

    Strided views keep their stride; tied tensors share their byte range. Raises `CheckpointError` (code in the pickle,
    compressed or missing records, big-endian data, a nested mapping, sparse or quantised tensors, damage).
    """
    with opened(path) as (stream, status):
        with damage_told(path, status.st_size, SUMMARY):
            archive = TorchArchive(path, stream, status.st_size)
        reader = reader_for(part)
        pickled = partial(io.BytesIO, archive.read("data.pkl"))
        state = StateDict(path, archive.place, reader, part)
        root = state.convert(unpickle(reader, pickled(), path, again=None if part.names else pickled))
        attributes = reader.attributes(root)
        return ShardContents(
            shard_file(path, "torch", status), tuple(state.entries), state.extras, versions(attributes)
        )


class TorchArchive(StoredZip):
    """The records of a zip by their name under the archive's folder. ``begin``: as `StoredZip` takes it."""

    def __init__(self, path: Path, stream: io.FileIO | Window, size: int, *, begin: int = 0) -> None:
        super().__init__(
            path,
            stream,
            size,
            summary=SUMMARY,
            packed_hint="it was packed again by another tool; save it with torch.save",
            begin=begin,
        )
        infos = self.infos
        root = infos[0].filename.partition("/")[0] + "/" if infos else ""
        for info in infos:
            name = info.filename.removeprefix(root)
            if name == info.filename or info.volume != 0:
                if not any(info.filename.endswith("/data.pkl") for info in infos):
                    self._refuse([info.filename for info in infos])
                self.fail(f"the zip is damaged: the record {info.filename!r} is not in the folder {root!r}")
            if name in self.records:
                self.fail(f"the zip has the record {name!r} twice")
            self.records[name] = info
        if "data.pkl" not in self.records:
            self._refuse(list(self.records))
        if "constants.pkl" in self.records:
            self.fail(
                "is a TorchScript archive, which holds code",
                expected="a state dict of tensors",
                hint="load it with torch.jit.load and save its state_dict()",
            )
        self._check_records()
        order = self.read("byteorder") if "byteorder" in self.records else None
        if order not in (None, b"little"):
            self.fail(
                "the tensors have the wrong byte order",
                expected="little",
                found=str(order, "latin1")[:20],
                hint="load it with torch on any machine and save it again",
            )

    def _refuse(self, names: list[str]) -> None:
        numpy = bool(names) and all(name.endswith(".npy") for name in names)
        self.fail(
            "is a zip, but not one that torch.save writes",
            expected="a record data.pkl",
            found=", ".join(names[:5]) or "an empty zip",
            hint=FROM_NUMPY if numpy else None,
        )

    def _check_records(self) -> None:
        """Every record: whole, and the small ones, whose case torch overlooks, what it wants them to be."""
        problems = []
        for name in self.records:
            where = self.range(name)
            if isinstance(where, Problem):
                problems.append(where)
            elif name.lower() in _TEXTS and not _is_text(self.read(name)):
                problems.append(self.damaged(name, "it is not text"))
            elif name.lower() in _NUMBERS and not self.read(name).strip().isdigit():
                problems.append(self.damaged(name, "it is not a number"))
        version = "version" if "version" in self.records else ".data/version"
        if version not in self.records:
            problems.append(Problem("the record 'version' is missing", file=self.path, hint="is the file damaged?"))
        elif not problems and int(self.read(version)) not in _VERSIONS:
            problems.append(self.damaged(version, "it is not a version that torch writes"))
        if problems:
            raise CheckpointError(SUMMARY, problems)

    def place(self, storage: StorageRef) -> tuple[int, int] | Problem:
        """The byte range of a storage: its record, which has to be of the size that the pickle tells."""
        name = f"data/{storage.key}"
        size = storage.numel * storage.dtype.itemsize
        if size == 0 and name not in self.records:
            return 0, 0
        where = self.range(name)
        if not isinstance(where, Problem) and where[1] - where[0] != size:
            return Problem(
                f"the record {name!r} is not of its storage's size",
                file=self.path,
                start=where[0],
                end=where[1],
                expected=f"{size} bytes",
                found=f"{where[1] - where[0]} bytes",
            )
        return where


class Likeness:
    """An archive that holds one tensor, and others that differ from it in nothing but values and their checksums: what
    was found in the one is in each of them, at the same places."""

    def __init__(self, archive: TorchArchive, found: TensorEntry, begin: int) -> None:
        self._found, self._begin = found, begin
        self._rest: bytearray | None = None
        spans = archive.spans()
        values = [name for name in spans if name.startswith("data/")]
        if len(values) != 1:
            return
        start, behind, checksum = spans[values[0]]
        varies = [(checksum, checksum + 4)]
        identity = (0, 0)
        if _IDENTITY in spans:
            at, end, checksum = spans[_IDENTITY]
            identity = at, at + archive.records[_IDENTITY].file_size
            varies += [(at, end), (checksum, checksum + 4)]
        self._gap = start, behind
        self._identity, *self._varies = (
            slice(*(at if at < behind else at - behind + start for at in span)) for span in (identity, *varies)
        )
        self._rest = self._told(archive.stream)

    def of(self, window: Window, key: str, path: Path, begin: int) -> TensorEntry | None:
        """The tensor of an archive of the same length that begins there in its file; None if it is not alike."""
        if self._rest is None or self._told(window) != self._rest:
            return None
        found, moved = self._found, begin - self._begin
        return TensorEntry(key, found.shape, found.dtype, path, found.start + moved, found.end + moved, found.stride)

    def _told(self, window: io.FileIO | Window) -> bytearray | None:
        told = window.around(*self._gap) if isinstance(window, Window) else None
        if told is None or not _is_text(told[self._identity]):
            return None
        for span in self._varies:
            told[span] = bytes(span.stop - span.start)
        return told


def _is_text(data: bytes | bytearray) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
