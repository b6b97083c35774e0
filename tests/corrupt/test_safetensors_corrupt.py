"""Every way in which a safetensors file can be wrong, and what the error says about it."""

from __future__ import annotations

import json
import os
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightlift.checkpoint import open_checkpoint, verify
from weightlift.errors import CheckpointError, CheckpointNotFound, Problem


def info(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def blob(header: Any, size: int = 4, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(size)


A = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>login</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5368709120\n"
XML = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>'

# name: (content, fragments of the message besides the file's name, the key or None)
CASES: dict[str, tuple[bytes, list[str], str | None]] = {
    "empty": (b"", ["truncated", "expected at least 8 bytes", "an empty file"], None),
    "seven bytes": (b"1234567", ["truncated", "[0:8]", "found 7 bytes"], None),
    "header longer than the file": (
        blob({"a": info()}, 0, length=4000),
        ["header is longer than the file", "[8:4008]", "expected a header of 4000 bytes", "download complete"],
        None,
    ),
    "header over 100 MB": (
        struct.pack("<Q", 100_000_001) + b"{}",
        ["header is too long", "at most 100000000 bytes", "found 100000001 bytes"],
        None,
    ),
    "header of 2**63": (struct.pack("<Q", 2**63) + b"{}", ["header is too long", "9223372036854775808"], None),
    "header of 2**64 - 1": (b"\xff" * 16, ["header is too long"], None),
    "empty header": (blob(b"", 0), ["does not begin with '{'", "an empty header"], None),
    "not UTF-8": (blob(b'{"\xff":1}', 0), ["not UTF-8", "[10:11]"], None),
    "UTF-8 surrogate": (blob(b'{"\xed\xa0\x80":1}', 0), ["not UTF-8"], None),
    "not JSON": (blob(b"{" + A, 4), ["not valid JSON"], None),
    "characters after": (blob(b"{" + A + b"}}", 4), ["not valid JSON", "Extra data"], None),
    "an array": (blob(b"[]", 0), ["does not begin with '{'", "found '['"], None),
    "white space first": (blob(b" {}", 0), ["does not begin with '{'", "found ' '"], None),
    "NaN": (blob(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), ["NaN is not JSON"], None),
    "Infinity": (blob(b'{"__metadata__":{"a":-Infinity}}', 0), ["-Infinity is not JSON"], None),
    "1e999": (blob(b'{"a":{"x":1e999,"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), ["out of range"], None),
    "nested deeply": (blob(b'{"a":' + b"[" * 100000, 0), ["nested too deeply"], None),
    "nested too deeply for serde": (
        blob(b'{"a":{"x":' + b"[" * 126 + b"]" * 126 + b',"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        ["nested too deeply"],
        "a",
    ),
    "a huge integer": (
        blob(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        ["not valid JSON"],
        None,
    ),
    "a control character": (blob(b'{"__metadata__":{"a":"\n"}}', 0), ["not valid JSON", "control character"], None),
    "a lone surrogate": (blob(b'{"__metadata__":{"a":"\\ud800"}}', 0), ["lone surrogate"], None),
    "duplicate key": (blob(b"{" + A + b"," + A + b"}"), ["the key is in the header twice", "unique keys"], "a"),
    "duplicate field": (
        blob(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        ["'dtype' twice"],
        "a",
    ),
    "duplicate metadata": (blob(b'{"__metadata__":{"x":"1","x":"2"}}', 0), ["'x' twice"], "__metadata__"),
    "metadata is a list": (blob({"__metadata__": []}, 0), ["not a map of strings", "found an array"], "__metadata__"),
    "metadata holds a number": (
        blob({"__metadata__": {"x": 1}}, 0),
        ["the value of 'x' is not a string", "found an integer"],
        "__metadata__",
    ),
    "no description": (blob({"a": None}), ["is not described", "found null"], "a"),
    "a list for a description": (blob({"a": ["F32", [1], [0, 4]]}), ["is not described", "found an array"], "a"),
    "no offsets": (blob({"a": {"dtype": "F32", "shape": [1]}}), ["is not described", "found no data_offsets"], "a"),
    "hole at the start": (
        blob({"a": info(offsets=(4, 8))}, 8),
        ["there is a hole before it", "expected data_offsets from 0", "found from 4"],
        "a",
    ),
    "hole between": (blob({"a": info(), "b": info(offsets=(8, 12))}, 12), ["hole before it", "from 4", "from 8"], "b"),
    "overlap": (blob({"a": info(shape=(2,), offsets=(0, 8)), "b": info(offsets=(4, 8))}, 8), ["overlaps 'a'"], "b"),
    "the same bytes twice": (blob({"a": info(), "b": info()}), ["overlaps 'a'", "data_offsets from 4"], "b"),
    "inside another": (
        blob({"a": info(shape=(3,), offsets=(0, 12)), "b": info(offsets=(4, 8))}, 12),
        ["overlaps 'a'"],
        "b",
    ),
    "negative offset": (blob({"a": info(offsets=(-4, 0))}), ["data_offsets are not offsets", "found [-4, 0]"], "a"),
    "reversed offsets": (blob({"a": info(offsets=(4, 0))}), ["end before they start", "found [4, 0]"], "a"),
    "three offsets": (blob({"a": info(offsets=(0, 2, 4))}), ["not offsets", "found [0, 2, 4]"], "a"),
    "float offsets": (blob({"a": info(offsets=(0.0, 4.0))}), ["not offsets", "found [0.0, 4.0]"], "a"),
    "offset of 2**64": (blob({"a": info(offsets=(0, 2**64))}), ["not offsets", "found [0, 18446744073709551616]"], "a"),
    "minus zero": (
        blob(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}', 0),
        ["not offsets", "found [-0.0, 0]"],
        "a",
    ),
    "beyond the end": (
        blob({"a": info(), "b": info(offsets=(4, 8))}, 6),
        ["lies beyond the end of the file", "bytes; found", "download complete"],
        "b",
    ),
    "all data missing": (blob({"a": info()}, 0), ["lies beyond the end"], "a"),
    "trailing bytes": (blob({"a": info()}, 5), ["bytes after the last tensor", "expected a file of"], None),
    "trailing bytes, no tensor": (blob({}, 1), ["bytes after the last tensor"], None),
    "size too small": (
        blob({"a": info(shape=(2,))}),
        ["size is not shape x dtype", "expected 8 bytes for shape [2] of F32", "found 4"],
        "a",
    ),
    "size too large": (blob({"a": info(shape=())}, 8)[:-4], [], None),  # valid: a scalar; replaced below
    "zero-size with bytes": (blob({"a": info(shape=(0, 3))}), ["expected 0 bytes", "found 4 bytes"], "a"),
    "half a byte": (blob({"a": info("F4", (3,), (0, 2))}, 2), ["12 bits, which are not whole bytes"], "a"),
    "overflowing shape": (
        blob({"a": info(shape=(2**32, 2**32, 2**32))}),
        ["shape overflows", "expected fewer than 2**64 bits"],
        "a",
    ),
    "overflow before a zero": (blob({"a": info(shape=(2**62, 4, 0), offsets=(0, 0))}, 0), ["shape overflows"], "a"),
    "overflow in bits": (blob({"a": info(shape=(2**60,))}), ["shape overflows"], "a"),
    "negative dimension": (blob({"a": info(shape=(-1,))}), ["shape is not a shape", "found [-1]"], "a"),
    "float dimension": (blob({"a": info(shape=(1.0,))}), ["shape is not a shape", "found [1.0]"], "a"),
    "boolean dimension": (blob({"a": info(shape=(True,))}), ["shape is not a shape", "found [true]"], "a"),
    "text dimension": (blob({"a": info(shape=("1",))}), ["shape is not a shape"], "a"),
    "shape is no list": (blob({"a": {**info(), "shape": 1}}), ["shape is not a shape", "found an integer"], "a"),
    "unknown dtype": (blob({"a": info("F33")}), ["unknown dtype", "expected one of BOOL", "found F33"], "a"),
    "lower-case dtype": (blob({"a": info("f32")}), ["unknown dtype", "found f32"], "a"),
    "dtype is a number": (blob({"a": info(32)}), ["unknown dtype", "found an integer"], "a"),
    "dtype without torch": (blob({"a": info("F6_E2M3", (4,), (0, 3))}, 3), ["unsupported dtype", "F6_E2M3", "U8"], "a"),
    "odd F4": (blob({"a": info("F4", (2, 1), (0, 1))}, 1), ["torch cannot hold this shape", "even last"], "a"),
    "HTML": (HTML, ["is an HTML page, not a safetensors file", "download it again"], None),
    "Git LFS": (LFS, ["is a Git LFS pointer to 5368709120 bytes", "git lfs pull"], None),
    "XML": (XML, ["is an XML document", "download it again"], None),
    "JSON error": (b'{"error":"Repository not found"}', ["is a JSON document", "download it again"], None),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), ["is a gzip archive", "unpack"], None),
    "GGUF": (b"GGUF" + bytes(30), ["is a GGUF file"], None),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", ["is a pickle", "name it .pt"], None),
}
del CASES["size too large"]


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path) -> None:
    content, fragments, key = CASES[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    for fragment in [str(path), *fragments]:
        assert fragment in text
    if key is not None:
        assert any(problem.key == key for problem in caught.value.problems)
    assert all(problem.file == path for problem in caught.value.problems)
    assert verify(path) == caught.value.problems


def test_zip_named_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"is a zip archive, as torch\.save writes.*name it \.pt"):
        open_checkpoint(path)


def test_every_problem_is_collected(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {
        "__metadata__": {"x": 1, "y": None},
        "a": info("F33"),
        "b": info(shape=(9,), offsets=(4, 8)),
        "c": info(offsets=(10, 14)),
        "d": info(offsets=(12, 16)),
        "e": info(shape=(1.5,), offsets=(16, 20)),
    }
    path.write_bytes(blob(header, 25))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["__metadata__", "__metadata__", "a", "b", "e", "c", "d", None]
    assert "(8 problems)" in str(caught.value)


def test_byte_ranges_are_absolute(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    content = blob({"a": info(), "b": info(offsets=(8, 12))}, 12)
    path.write_bytes(content)
    (problem,) = verify(path)
    data = len(content) - 12
    assert (problem.start, problem.end) == (data + 4, data + 8)


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(5), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="safetensors"):
            open_checkpoint(path)


def test_nothing_is_allocated_by_a_number_in_the_file(tmp_path: Path) -> None:
    """In a process that may not grow by 64 MB, a header that claims 99 MB is refused for the right reason."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 99_000_000) + b'{"a":' + bytes(100))
    pid = os.fork()
    if pid == 0:
        try:
            with open("/proc/self/statm") as statm:
                used = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + 64_000_000, used + 64_000_000))
            problems: tuple[Problem, ...] = verify(path)
            os._exit(0 if "longer than the file" in problems[0].what else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_special_files(tmp_path: Path) -> None:
    fifo = tmp_path / "x.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(CheckpointError, match="not a regular file; expected a regular file; found a pipe"):
        open_checkpoint(fifo)
    with pytest.raises(CheckpointError, match="found a device"):
        open_checkpoint("/dev/zero")
    dangling = tmp_path / "y.safetensors"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFound, match=r"y\.safetensors: no such file"):
        open_checkpoint(dangling)
    folder = tmp_path / "folder"
    (folder / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointNotFound, match="no checkpoint in this folder"):
        open_checkpoint(folder)
