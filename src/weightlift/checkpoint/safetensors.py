"""The safetensors format: a strict parser of its header. No tensor byte is read.

A file is 8 bytes (the length ``n`` of the header, little-endian), ``n`` bytes of JSON, then the data, to which the
offsets in the header are relative. Every problem of a file is collected before `CheckpointError` is raised.

Accepted and refused files are those of the official parser (safetensors 0.8), except that these, which it lets
through, are refused:

- *The format's rules:* the header must begin with ``{`` (white space before it is refused); duplicate keys are
  disallowed, at every level; each tensor is an object (serde also takes an array of the three values) and its dtype a
  string (serde also takes ``{"F32": null}``).
- *What torch cannot hold,* and the official binding refuses only when that tensor is fetched: dtypes without a torch
  counterpart (``F6_E2M3``, ``F6_E3M2``), an odd last dimension of ``F4``, a dimension or a row-major stride of 2**63
  or more beside a dimension of zero.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from weightlift import dtypes
from weightlift.checkpoint.entry import ShardContents, ShardFile, TensorEntry
from weightlift.checkpoint.files import opened, read_exactly, shard_file
from weightlift.checkpoint.plain_header import plain_entries
from weightlift.checkpoint.reader import require_unchanged
from weightlift.checkpoint.sniff import HEAD_BYTES, sniff
from weightlift.errors import CheckpointError, Problem

MAX_HEADER_BYTES = 100_000_000
"""The official parser's limit, in bytes."""

_METADATA = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
# serde_json's limit of 128 levels, less those of the header and of the tensor's object.
_MAX_FIELD_DEPTH = 125
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TRUNCATED = "is the download complete?"


def read_safetensors(
    path: Path, *, within: tuple[int, int] | None = None, known: ShardFile | None = None
) -> ShardContents:
    """The records of a ``.safetensors`` file, in the order of its header, with absolute byte ranges.

    ``within`` is the range of an archive that is such a file, ``known`` the archive as it was when that was found out.
    Raises `CheckpointError` with every problem of the file, `CheckpointNotFound` when it does not exist,
    `CheckpointChanged` when it is not the archive that is known.
    """
    with opened(path) as (stream, status):
        if known is not None:
            require_unchanged(known, status)
        start, end = (0, status.st_size) if within is None else within
        try:
            text = _header_text(stream, path, start, end - start)
            file = shard_file(path, "safetensors", status) if known is None else known
            data = start + 8 + (len(text) if text.isascii() else len(text.encode("utf-8")))
            plain = plain_entries(text, path, data, end)
            if plain is not None:
                return ShardContents(replace(file, metadata=MappingProxyType(plain[0])), plain[1])
            return _Header(file, data, end).parse(_loads(text, path))
        except CheckpointError as error:
            head = read_exactly(stream, path, start, min(end - start, HEAD_BYTES))
            raise _explained(error, path, head) from None


def _fail(path: Path, what: str, **where: Any) -> NoReturn:
    raise CheckpointError("not a valid safetensors file", [Problem(what, file=path, **where)])


def _explained(error: CheckpointError, path: Path, head: bytes) -> CheckpointError:
    """``error``, or a better one if the file is recognisably something else than safetensors."""
    sniffed = sniff(head)
    if sniffed is None or sniffed.kind == "safetensors":
        return error
    what = f"is {sniffed.found}, not a safetensors file"
    return CheckpointError("not a valid safetensors file", [Problem(what, file=path, hint=sniffed.hint)])


def _header_text(stream: io.FileIO, path: Path, begin: int, size: int) -> str:
    """The header as text. The length read from the file is trusted only within the real size from ``begin`` on."""
    first = begin + 8
    if size < 8:
        expected = "at least 8 bytes, the length of the header"
        found = f"{size} bytes" if size else "an empty file"
        _fail(path, "is truncated", start=begin, end=first, expected=expected, found=found, hint=_TRUNCATED)
    length = int.from_bytes(read_exactly(stream, path, begin, 8), "little")
    if length > MAX_HEADER_BYTES:
        expected = f"a header of at most {MAX_HEADER_BYTES} bytes"
        _fail(path, "the header is too long", start=begin, end=first, expected=expected, found=f"{length} bytes")
    if 8 + length > size:
        found = f"{size - 8} bytes after the length"
        expected = f"a header of {length} bytes"
        what = "the header is longer than the file"
        _fail(path, what, start=first, end=first + length, expected=expected, found=found, hint=_TRUNCATED)
    raw = read_exactly(stream, path, first, length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _fail(path, "the header is not UTF-8", start=first + error.start, end=first + error.end, found=error.reason)
    if not text.startswith("{"):
        found = repr(text[:1]) if text else "an empty header"
        _fail(path, "the header does not begin with '{'", start=first, end=first + length, expected="'{'", found=found)
    return text


class _Duplicates:
    """The object hook: plain dicts, and a note of the keys that an object holds twice."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, Any], list[str]]] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            self.found.append((made, [name for name, count in counts.items() if count > 1]))
        return made


def _loads(text: str, path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The header's object and its duplicate keys; like serde_json where Python's json is laxer."""
    duplicates = _Duplicates()
    hooks: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite}
    if "-0" in text:
        # Python reads it as the integer 0, serde as a float, which no shape or offset may be. Not always passed: a
        # call for each number would double the time of a header of 100,000 tensors.
        hooks["parse_int"] = lambda digits: -0.0 if digits == "-0" else int(digits)
    try:
        header = json.loads(text, object_pairs_hook=duplicates, **hooks)
        if _SURROGATE.search(text):
            json.dumps(header, ensure_ascii=False).encode("utf-8")  # a lone surrogate, which is not text, fails here
    except RecursionError:
        _fail(
            path, "the header is nested too deeply", start=8, end=8 + len(text.encode()), expected="127 levels at most"
        )
    except UnicodeEncodeError:
        _fail(path, "the header is not valid JSON: a lone surrogate in a string", start=8)
    except ValueError as error:
        _fail(path, f"the header is not valid JSON: {error}", start=8, end=8 + len(text.encode()))
    assert isinstance(header, dict)  # it begins with '{'
    problems = []
    for owner, names in duplicates.found:
        inside = next((key for key, value in header.items() if value is owner), None)
        problems += [_duplicate(path, name, None if owner is header else inside) for name in names]
    return header, problems


def _duplicate(path: Path, name: str, inside: str | None) -> Problem:
    if inside is None:
        return Problem("the key is in the header twice", key=name, file=path, expected="unique keys")
    return Problem(f"the header has {name!r} twice in it", key=inside, file=path, expected="unique keys")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number out of range")
    return value


class _Header:
    """The checks of one header against the file it came from."""

    def __init__(self, file: ShardFile, data: int, end: int) -> None:
        self.file = file
        self.path = file.path
        self.data = data
        self.end = end
        self.problems: list[Problem] = []
        # (start, end, key), relative to the data; None once a tensor's offsets are no offsets at all.
        self.spans: list[tuple[int, int, str]] | None = []

    def parse(self, loaded: tuple[dict[str, Any], list[Problem]]) -> ShardContents:
        header, duplicates = loaded
        self.problems += duplicates
        metadata = self._metadata(header.pop(_METADATA, None))
        entries = [entry for key, info in header.items() if (entry := self._entry(key, info)) is not None]
        if self.spans is not None:
            self._layout(self.spans)
        if self.problems:
            raise CheckpointError("not a valid safetensors file", self.problems)
        return ShardContents(replace(self.file, metadata=metadata), tuple(entries))

    def _problem(self, key: str, what: str, **more: Any) -> None:
        self.problems.append(Problem(what, key=key, file=self.path, **more))

    def _metadata(self, value: Any) -> Mapping[str, str]:
        if value is None:  # absent, or null, which the official parser takes for absent
            return MappingProxyType({})
        if not isinstance(value, dict):
            self._problem(_METADATA, "is not a map of strings", expected="an object", found=_kind(value))
            return MappingProxyType({})
        for name, text in value.items():
            if not isinstance(text, str):
                what = f"the value of {name!r} is not a string"
                self._problem(_METADATA, what, expected="a string", found=_kind(text))
        return MappingProxyType(value)

    def _entry(self, key: str, info: Any) -> TensorEntry | None:
        """The record of one tensor; None, with a problem noted, when it breaks a rule by itself."""
        if type(info) is not dict or not info.keys() >= _FIELDS:
            self.spans = None
            lacking = ", ".join(sorted(_FIELDS - info.keys())) if type(info) is dict else ""
            found = f"no {lacking}" if lacking else _kind(info)
            self._problem(key, "is not described", expected="an object with dtype, shape, data_offsets", found=found)
            return None
        if len(info) > 3 and not self._ignorable(key, info):
            return None
        span = self._offsets(key, info["data_offsets"])
        shape = self._shape(key, info["shape"])
        name = info["dtype"]
        dtype = dtypes.TORCH.get(name) if type(name) is str else None
        if dtype is None:
            self._unknown(key, name)
            return None
        if span is None or shape is None:
            return None
        held = self._sized(key, name, shape, *span)
        if held is None:
            return None
        return TensorEntry(key, held, dtype, self.path, self.data + span[0], self.data + span[1])

    def _unknown(self, key: str, name: Any) -> None:
        if type(name) is str and name in dtypes.BITS:
            hint = "the file is valid, but torch cannot hold this tensor; save it packed as U8"
            self._problem(key, "unsupported dtype", expected="a dtype that torch has", found=name, hint=hint)
        else:
            found = name if type(name) is str else _kind(name)
            self._problem(key, "unknown dtype", expected=f"one of {', '.join(dtypes.BITS)}", found=found)

    def _ignorable(self, key: str, info: dict[str, Any]) -> bool:
        """Unknown fields are ignored, as the official parser does, if their nesting and numbers are JSON to it."""
        level = [value for name, value in info.items() if name not in _FIELDS]
        for _ in range(_MAX_FIELD_DEPTH + 1):
            for value in level:
                if type(value) is int and abs(value) >= 2**1024:
                    self._problem(key, "the header is not valid JSON: a number out of range")
                    return False
            nested = [value for value in level if isinstance(value, (dict, list))]
            if not nested:
                return True
            level = [item for value in nested for item in (value.values() if isinstance(value, dict) else value)]
        self._problem(key, "the header is nested too deeply", expected="127 levels at most")
        return False

    def _offsets(self, key: str, value: Any) -> tuple[int, int] | None:
        valid = type(value) is list and len(value) == 2
        if valid:
            start, end = value
            valid = type(start) is int and type(end) is int and 0 <= start < 2**64 and 0 <= end < 2**64
        if not valid:
            self.spans = None
            expected = "two integers from 0 up"
            self._problem(key, "data_offsets are not offsets", expected=expected, found=_brief(value))
            return None
        if end < start:
            self.spans = None
            self._problem(key, "data_offsets end before they start", expected="start <= end", found=_brief(value))
            return None
        if self.spans is not None:
            self.spans.append((start, end, key))
        return start, end

    def _shape(self, key: str, value: Any) -> tuple[int, ...] | None:
        if type(value) is list:
            for size in value:
                if type(size) is not int or not 0 <= size < 2**63:
                    break
            else:
                return tuple(value)
        expected = "a list of integers from 0 up to 2**63"
        self._problem(key, "shape is not a shape", expected=expected, found=_brief(value))
        return None

    def _sized(self, key: str, name: str, shape: tuple[int, ...], start: int, end: int) -> tuple[int, ...] | None:
        """The shape for torch, if the bytes are as many as shape and dtype ask for."""
        numel = 1
        for size in shape:
            numel *= size
            if numel >= 2**64:
                break
        bits = numel * dtypes.BITS[name]
        if bits >= 2**64:
            found = f"shape {list(shape)} of {name}"
            self._problem(key, "shape overflows", expected="fewer than 2**64 bits", found=found)
            return None
        if bits % 8 or end - start != bits // 8:
            wanted = f"{bits // 8} bytes" if not bits % 8 else f"{bits} bits, which are not whole bytes"
            self._problem(
                key,
                "the size is not shape x dtype",
                start=self.data + start,
                end=self.data + end,
                expected=f"{wanted} for shape {list(shape)} of {name}",
                found=f"{end - start} bytes",
            )
            return None
        held = dtypes.torch_shape(name, shape)
        if held is None or not (numel or _strides_fit(shape)):
            expected = (
                "an even last dimension (torch packs two F4 in a byte)" if held is None else "strides under 2**63"
            )
            self._problem(key, "torch cannot hold this shape", expected=expected, found=f"shape {list(shape)}")
            return None
        return held

    def _layout(self, spans: list[tuple[int, int, str]]) -> None:
        """Sorted by their offsets, the tensors must cover the data exactly: no hole, no overlap, nothing left."""
        data, size = self.data, self.end - self.data
        spans.sort()
        position, before = 0, ""
        for start, end, key in spans:
            if start > position:
                self._problem(
                    key,
                    "there is a hole before it",
                    start=data + position,
                    end=data + start,
                    expected=f"data_offsets from {position}",
                    found=f"from {start}",
                )
            elif start < position:
                self._problem(
                    key,
                    f"overlaps {before!r}",
                    start=data + start,
                    end=data + min(position, max(end, start + 1)),
                    expected=f"data_offsets from {position}",
                    found=f"from {start}",
                )
            if end >= position:
                position, before = end, key
        if position > size:
            key = next(name for _, end, name in spans if end > size)
            self._problem(
                key,
                "lies beyond the end of the file",
                start=data + size,
                end=data + position,
                expected=f"a file of {data + position} bytes",
                found=f"{data + size} bytes",
                hint=_TRUNCATED,
            )
        elif position < size:
            expected = f"a file of {data + position} bytes"
            self.problems.append(
                Problem(
                    "there are bytes after the last tensor",
                    file=self.path,
                    start=data + position,
                    end=data + size,
                    expected=expected,
                    found=f"{data + size} bytes",
                )
            )


def _strides_fit(shape: tuple[int, ...]) -> bool:
    stride = 1
    for size in reversed(shape[1:]):
        stride *= max(size, 1)
        if stride >= 2**63:
            return False
    return True


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        int: "an integer",
        float: "a float",
        bool: "a boolean",
        type(None): "null",
    }
    return names[type(value)]


def _brief(value: Any) -> str:
    if type(value) is list and len(value) <= 16 and not any(isinstance(x, (list, dict, str)) for x in value):
        text = ", ".join(json.dumps(x) if not (type(x) is int and abs(x) >= 2**70) else "an integer" for x in value)
        return f"[{text}]"
    return _kind(value)
