"""Zips whose records are stored as they are, so that each is a byte range of the file. No record is unpacked.

The directory is read by Python's zipfile; what that doesn't check of the end records and of each record's own header is
checked here. Shared by the formats that are zips.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from weightlift.checkpoint.files import read_exactly
from weightlift.errors import CheckpointError, Problem

_LOCAL = struct.Struct("<4s5H3I2H")  # signature, version, flags, method, time, date, crc, sizes, name and extra lengths
_FLAGS = 0x0808  # sizes follow the record; its name is UTF-8: what torch writes, and plain zips have neither
_FOLDER = 0x10
_ENTRY = struct.Struct("<28s3H12s")  # … lengths of name, extra and comment …
_END = struct.Struct("<4s4H2IH")  # signature, disk, directory's disk, records on it, records, size, offset, comment
_END64 = struct.Struct("<4sQ2H2I4Q")  # signature, size, versions, disks, records on it, records, size, offset
_LOCATOR64 = struct.Struct("<4sIQI")  # signature, disk, offset, disks
_MAX_TAIL_BYTES = _END.size + 0xFFFF
_KEPT_BYTES = 4096
_CHECKSUM_AT = 16  # in an entry of the directory

_DAMAGE = (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error, ValueError)


@contextlib.contextmanager
def damage_told(path: Path, size_bytes: int, summary: str) -> Iterator[None]:
    """Around the reading of a directory: what it raises for a damaged zip becomes the `CheckpointError` of the file."""
    try:
        yield
    except CheckpointError:  # a ValueError, and told already
        raise
    except _DAMAGE as error:
        hint = "is the download complete?"
        problem = Problem(f"the zip is damaged: {error}", file=path, found=f"{size_bytes} bytes", hint=hint)
        raise CheckpointError(summary, [problem]) from None


class Window(io.RawIOBase):
    """The bytes ``begin:end`` of a stream, as a stream of their own. Keeps its first and its last ones."""

    def __init__(self, stream: io.FileIO, path: Path, begin: int, end: int) -> None:
        super().__init__()
        self._stream, self._path, self._begin, self._size = stream, path, begin, end - begin
        self._at = 0
        self._head = self._kept(0, min(_KEPT_BYTES, self._size))
        self._tail_at = max(0, self._size - _KEPT_BYTES)
        self._tail = self._kept(self._tail_at, self._size - self._tail_at)

    def around(self, start: int, end: int) -> bytearray | None:
        """What lies before ``start`` and behind ``end``; None where not all of that is kept."""
        if start > len(self._head) or end < self._tail_at:
            return None
        return bytearray(self._head[:start] + self._tail[end - self._tail_at :])

    def _kept(self, start: int, count: int) -> bytes:
        return read_exactly(self._stream, self._path, self._begin + start, count)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As `io.RawIOBase.seek`."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase.readinto`."""
        at, count = self._at, min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        if at + count <= len(self._head):
            found = self._head[at : at + count]
        elif at >= self._tail_at:
            found = self._tail[at - self._tail_at : at - self._tail_at + count]
        else:
            found = self._kept(at, count)
        buffer[:count] = found
        self._at = at + count
        return count


class StoredZip:
    """The directory of a zip, and the byte range of each of its records. To be used while ``stream`` is open.

    A subclass fills ``records``, the directory's entries by the names that it gives them. ``summary`` and
    ``packed_hint`` are for messages. ``begin``: where in the file of ``path`` the zip begins, of which ``stream`` gives
    ``size`` bytes.
    """

    def __init__(
        self, path: Path, stream: io.FileIO | Window, size: int, *, summary: str, packed_hint: str, begin: int = 0
    ) -> None:
        self.path = path
        self.stream = stream
        self._begin = begin
        self._summary = summary
        self._packed_hint = packed_hint
        # zipfile takes a short read, which a raw stream may give, for the end of the file.
        buffered = io.BufferedReader(stream)
        try:
            with zipfile.ZipFile(buffered) as directory:
                self.infos = directory.infolist()
                self.limit = directory.start_dir
            self._check_end(size, len(self.infos))
        finally:
            buffered.detach()
        self.records: dict[str, zipfile.ZipInfo] = {}
        self._ranges: dict[str, tuple[int, int] | Problem] = {}

    def fail(self, what: str, **more: str | None) -> NoReturn:
        """Raise the error of this file."""
        raise CheckpointError(self._summary, [Problem(what, file=self.path, **more)])  # type: ignore[arg-type]

    def _check_end(self, size: int, count: int) -> None:
        """The end record, of which zipfile believes only parts: one disk, all records, nothing before or behind."""
        tail = b""
        for reach in (_END.size, _MAX_TAIL_BYTES):  # without a comment, which few have, and with one
            begin = max(0, size - reach)
            tail = read_exactly(self.stream, self.path, begin, size - begin)
            if tail.startswith(b"PK\5\6"):
                break
        at = tail.rfind(b"PK\5\6")
        if at < 0 or at + _END.size > len(tail):
            self.fail("the zip is damaged: it has no end record")
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
            self.fail("the zip is damaged: its end record does not describe this file")
        directory = read_exactly(self.stream, self.path, self.limit, length)
        at = 0
        while at + _ENTRY.size <= length:  # zipfile overlooks a name, extra or comment that ends behind the directory
            at += _ENTRY.size + sum(_ENTRY.unpack_from(directory, at)[1:4])
        if at != length:
            self.fail("the zip is damaged: its directory is not of its length")

    def _wide_end(self, end: int) -> tuple[int, int, int, int, int] | None:
        """Where the zip64 end record lies, and what it says of the directory; None when there is none."""
        if end < _LOCATOR64.size + _END64.size:
            return None
        locator = read_exactly(self.stream, self.path, end - _LOCATOR64.size, _LOCATOR64.size)
        signature, disk, at, disks = _LOCATOR64.unpack(locator)
        if signature != b"PK\6\7":
            return None
        if disk != 0 or disks > 1 or at + _END64.size + _LOCATOR64.size != end:
            self.fail("the zip is damaged: its zip64 end record is not where it should be")
        record = _END64.unpack(read_exactly(self.stream, self.path, at, _END64.size))
        if record[0] != b"PK\6\6" or record[4] or record[5]:
            self.fail("the zip is damaged: its zip64 end record is wrong")
        return (at, *record[6:])

    def range(self, name: str) -> tuple[int, int] | Problem:
        """Where the bytes of a record lie in the file, the zip's own begin included; looked up once."""
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
                hint=self._packed_hint,
            )
        if info.external_attr & _FOLDER:
            return self.damaged(name, "it is marked as a folder, which has no bytes")
        begin = info.header_offset
        if begin < 0 or begin + _LOCAL.size > self.limit:
            return self.damaged(name, "its header is not in the file")
        signature, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(
            read_exactly(self.stream, self.path, begin, _LOCAL.size)
        )
        start = begin + _LOCAL.size + name_length + extra_length
        end = start + info.file_size
        if signature != b"PK\x03\x04" or method != zipfile.ZIP_STORED or flags & ~_FLAGS:
            return self.damaged(name, "its header does not agree with the directory")
        if info.compress_size != info.file_size or end > self.limit:
            where = f"{self._begin + start}:{self._begin + end}"
            return self.damaged(name, f"its bytes, {where}, are not in the file")
        stored = read_exactly(self.stream, self.path, begin + _LOCAL.size, name_length)
        if stored != info.orig_filename.encode("utf-8" if flags & 0x800 else "cp437"):
            return self.damaged(name, "its header has another name")
        return self._begin + start, self._begin + end

    def spans(self) -> dict[str, tuple[int, int, int]]:
        """Of each record: where in the zip its bytes begin, what comes behind it, and its checksum in the directory.
        Empty where records overlap, or have names of which that would be hard to tell."""
        found = {}
        at = behind = self.limit
        checksums = {}
        for name, info in self.records.items():
            checksums[name] = at + _CHECKSUM_AT
            at += _ENTRY.size + len(info.orig_filename) + len(info.extra) + len(info.comment)
        for name, info in sorted(self.records.items(), key=lambda item: -item[1].header_offset):
            where = self.range(name)
            if isinstance(where, Problem) or where[1] - self._begin > behind or not info.orig_filename.isascii():
                return {}
            found[name] = where[0] - self._begin, behind, checksums[name]
            behind = info.header_offset
        return found

    def damaged(self, name: str, why: str) -> Problem:
        """A problem with a record."""
        return Problem(f"the record {name!r} of the zip is damaged: {why}", file=self.path)

    def read(self, name: str) -> bytes:
        """The bytes of a record, no more than the file has."""
        where = self.range(name)
        if isinstance(where, Problem):
            raise CheckpointError(self._summary, [where])
        return read_exactly(self.stream, self.path, where[0] - self._begin, where[1] - where[0])
