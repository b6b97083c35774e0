"""The zip format of ``torch.save``: byte ranges from the zip's directory, shapes from its pickle.

Tensor bytes are not read: each record is stored uncompressed, so a tensor is a range of the file. The directory is
read by Python's zipfile; each record's own header is then read to find where its bytes begin, and has to agree.
"""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import NoReturn

from weightlift.checkpoint.entry import ShardContents
from weightlift.checkpoint.files import opened, read_exactly, shard_file
from weightlift.checkpoint.torch_globals import StorageRef
from weightlift.checkpoint.torch_pickle import PickleReader
from weightlift.checkpoint.torch_state import SUMMARY, StateDict, unpickle, versions
from weightlift.errors import CheckpointError, Problem

_LOCAL = struct.Struct("<4s5H3I2H")  # signature, version, flags, method, time, date, crc, sizes, name and extra lengths
_FLAGS = 0x0808  # sizes follow the record; its name is UTF-8: what torch writes, and plain zips have neither
_FOLDER = 0x10
_VERSIONS = range(1, 11)
_ENTRY = struct.Struct("<28s3H12s")  # … lengths of name, extra and comment …
_END = struct.Struct("<4s4H2IH")  # signature, disk, directory's disk, records on it, records, size, offset, comment
_END64 = struct.Struct("<4sQ2H2I4Q")  # signature, size, versions, disks, records on it, records, size, offset
_LOCATOR64 = struct.Struct("<4sIQI")  # signature, disk, offset, disks
_MAX_TAIL_BYTES = _END.size + 0xFFFF
_TEXTS = ("byteorder", ".data/serialization_id")
_NUMBERS = ("version", ".data/version", ".format_version", ".storage_alignment")


def read_torch_zip(path: Path) -> ShardContents:
    """The records of a file that ``torch.save`` wrote, in the order of its state dict.

    Strided views keep their stride; tied tensors share their byte range. Raises `CheckpointError` (code in the pickle,
    compressed or missing records, big-endian data, a nested mapping, sparse or quantised tensors, damage).
    """
    with opened(path) as (stream, status):
        try:
            archive = _Archive(path, stream, status.st_size)
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            _fail(
                path, f"the zip is damaged: {error}", found=f"{status.st_size} bytes", hint="is the download complete?"
            )
        order = archive.small("byteorder")
        if order not in (None, b"little"):
            _fail(
                path,
                "the tensors have the wrong byte order",
                expected="little",
                found=str(order, "latin1")[:20],
                hint="load it with torch on any machine and save it again",
            )
        reader = PickleReader()
        root = unpickle(reader, io.BytesIO(archive.read("data.pkl")), path)
        state = StateDict(path, archive.place)
        state.convert(root)
        attributes = reader.attributes(root)
        return ShardContents(
            shard_file(path, "torch", status), tuple(state.entries), state.extras, versions(attributes)
        )


def _fail(path: Path, what: str, **more: str | None) -> NoReturn:
    raise CheckpointError(SUMMARY, [Problem(what, file=path, **more)])  # type: ignore[arg-type]


class _Archive:
    """The records of a zip by their name under the archive's folder."""

    def __init__(self, path: Path, stream: io.FileIO, size: int) -> None:
        self.path = path
        self.stream = stream
        # zipfile takes a short read, which a raw stream may give, for the end of the file.
        buffered = io.BufferedReader(stream)
        try:
            with zipfile.ZipFile(buffered) as directory:
                infos = directory.infolist()
                self.limit = directory.start_dir
            self._check_end(size, len(infos))
        finally:
            buffered.detach()
        self.records: dict[str, zipfile.ZipInfo] = {}
        self._ranges: dict[str, tuple[int, int] | Problem] = {}
        root = infos[0].filename.partition("/")[0] + "/" if infos else ""
        for info in infos:
            name = info.filename.removeprefix(root)
            if name == info.filename or info.volume != 0:
                _fail(path, f"the zip is damaged: the record {info.filename!r} is not in the folder {root!r}")
            if name in self.records:
                _fail(path, f"the zip has the record {name!r} twice")
            self.records[name] = info
        if "data.pkl" not in self.records:
            _fail(
                path,
                "is a zip, but not one that torch.save writes",
                expected="a record data.pkl",
                found=", ".join(list(self.records)[:5]) or "an empty zip",
            )
        if "constants.pkl" in self.records:
            _fail(
                path,
                "is a TorchScript archive, which holds code",
                expected="a state dict of tensors",
                hint="load it with torch.jit.load and save its state_dict()",
            )

        self._check_records()

    def _check_end(self, size: int, count: int) -> None:
        """The end record, of which zipfile believes only parts: one disk, all records, nothing before or behind."""
        begin = max(0, size - _MAX_TAIL_BYTES)
        tail = read_exactly(self.stream, self.path, begin, size - begin)
        at = tail.rfind(b"PK\5\6")
        if at < 0 or at + _END.size > len(tail):
            _fail(self.path, "the zip is damaged: it has no end record")
        _, disk, first_disk, here, records, length, offset, comment = _END.unpack_from(tail, at)
        end = directory_end = begin + at
        wide = self._wide_end(end)
        if wide is not None:
            directory_end, here, records, length, offset = wide
        right = (
            disk == first_disk == 0 and here == records == count
            and offset == self.limit and offset + length == directory_end and end + _END.size + comment == size
        )  # fmt: skip
        if not right:
            _fail(self.path, "the zip is damaged: its end record does not describe this file")
        directory = read_exactly(self.stream, self.path, self.limit, length)
        at = 0
        while at + _ENTRY.size <= length:  # zipfile overlooks a name, extra or comment that ends behind the directory
            at += _ENTRY.size + sum(_ENTRY.unpack_from(directory, at)[1:4])
        if at != length:
            _fail(self.path, "the zip is damaged: its directory is not of its length")

    def _wide_end(self, end: int) -> tuple[int, int, int, int, int] | None:
        """Where the zip64 end record lies, and what it says of the directory; None when there is none."""
        if end < _LOCATOR64.size + _END64.size:
            return None
        locator = read_exactly(self.stream, self.path, end - _LOCATOR64.size, _LOCATOR64.size)
        signature, disk, at, disks = _LOCATOR64.unpack(locator)
        if signature != b"PK\6\7":
            return None
        if disk != 0 or disks > 1 or at + _END64.size + _LOCATOR64.size != end:
            _fail(self.path, "the zip is damaged: its zip64 end record is not where it should be")
        record = _END64.unpack(read_exactly(self.stream, self.path, at, _END64.size))
        if record[0] != b"PK\6\6" or record[4] or record[5]:
            _fail(self.path, "the zip is damaged: its zip64 end record is wrong")
        return (at, *record[6:])

    def _check_records(self) -> None:
        """Every record: whole, and the small ones, whose case torch overlooks, what it wants them to be."""
        problems = []
        for name in self.records:
            where = self.range(name)
            if isinstance(where, Problem):
                problems.append(where)
            elif name.lower() in _TEXTS and not _is_text(self.read(name)):
                problems.append(self._damaged(name, "it is not text"))
            elif name.lower() in _NUMBERS and not self.read(name).strip().isdigit():
                problems.append(self._damaged(name, "it is not a number"))
        version = "version" if "version" in self.records else ".data/version"
        if version not in self.records:
            problems.append(Problem("the record 'version' is missing", file=self.path, hint="is the file damaged?"))
        elif not problems and int(self.read(version)) not in _VERSIONS:
            problems.append(self._damaged(version, "it is not a version that torch writes"))
        if problems:
            raise CheckpointError(SUMMARY, problems)

    def range(self, name: str) -> tuple[int, int] | Problem:
        """Where the bytes of a record lie in the file; looked up once."""
        if name not in self._ranges:
            self._ranges[name] = self._range(name)
        return self._ranges[name]

    def _range(self, name: str) -> tuple[int, int] | Problem:
        info = self.records.get(name)
        if info is None:
            return Problem(f"the record {name!r} is missing", file=self.path, hint="is the file damaged?")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ~_FLAGS:
            return Problem(
                f"the record {name!r} is compressed or encrypted",
                file=self.path,
                expected="stored as it is",
                hint="it was packed again by another tool; save it with torch.save",
            )
        if info.external_attr & _FOLDER:
            return self._damaged(name, "it is marked as a folder, which has no bytes")
        begin = info.header_offset
        if begin < 0 or begin + _LOCAL.size > self.limit:
            return self._damaged(name, "its header is not in the file")
        signature, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(
            read_exactly(self.stream, self.path, begin, _LOCAL.size)
        )
        start = begin + _LOCAL.size + name_length + extra_length
        end = start + info.file_size
        if signature != b"PK\x03\x04" or method != zipfile.ZIP_STORED or flags & ~_FLAGS:
            return self._damaged(name, "its header does not agree with the directory")
        if info.compress_size != info.file_size or end > self.limit:
            return self._damaged(name, f"its bytes, {start}:{end}, are not in the file")
        stored = read_exactly(self.stream, self.path, begin + _LOCAL.size, name_length)
        if stored != info.orig_filename.encode("utf-8" if flags & 0x800 else "cp437"):
            return self._damaged(name, "its header has another name")
        return start, end

    def _damaged(self, name: str, why: str) -> Problem:
        return Problem(f"the record {name!r} of the zip is damaged: {why}", file=self.path)

    def read(self, name: str) -> bytes:
        """The bytes of a record, no more than the file has."""
        where = self.range(name)
        if isinstance(where, Problem):
            raise CheckpointError(SUMMARY, [where])
        return read_exactly(self.stream, self.path, where[0], where[1] - where[0])

    def small(self, name: str) -> bytes | None:
        """The first bytes of a record; None when there is no such record."""
        return self.read(name)[:64] if name in self.records else None

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


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
