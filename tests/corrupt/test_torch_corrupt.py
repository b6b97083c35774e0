"""What is wrong with torch files, code in the pickle above all."""

from __future__ import annotations

import collections
import fractions
import io
import os
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from weightlift.checkpoint import open_checkpoint, verify
from weightlift.errors import CheckpointError

FORMATS = [True, False]


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/weightlift-was-here",)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.problems and all(problem.file == path for problem in caught.value.problems)
    assert verify(path) == caught.value.problems
    return str(caught.value)


def repack(source: Path, target: Path, *, compress: int = zipfile.ZIP_STORED, **replaced: bytes | None) -> None:
    """Write the zip again with some records replaced (None: left out)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compress) as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            content = replaced.get(name, old.read(info))
            if content is not None:
                new.writestr(info.filename, content, compress)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "good.pt"
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int8)}, path)
    return path


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("value", [Evil(), torch.nn.Linear(2, 2), Path("x"), collections.deque(), print])
def test_code_is_never_run(tmp_path: Path, zipped: bool, value: Any) -> None:
    path = tmp_path / "x.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.ones(1), "b": value}, path, _use_new_zipfile_serialization=zipped)
    text = refused(path)
    assert "holds code, which weightlift never runs" in text
    assert any(name in text for name in ("posix.mkdir", "torch.nn.modules.linear.Linear", "pathlib", "deque", "print"))
    assert not os.path.exists("/tmp/weightlift-was-here")


def opcodes(tmp_path: Path, saved: Path, data: bytes) -> str:
    path = tmp_path / "op.pt"
    repack(saved, path, **{"data.pkl": data})
    return refused(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
        b"\x80\x02c__builtin__\neval\nX\x01\0\0\x001\x85R.",
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x02ctorch.serialization\nload\n.",
        b"\x80\x02ctorch.hub\nload\n.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02cbuiltins\nbytearray.__init__\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"\x80\x02ctorch\nfloat32.__class__\n.",
    ],
)
def test_forbidden_globals(tmp_path: Path, saved: Path, data: bytes) -> None:
    assert "holds code, which weightlift never runs" in opcodes(tmp_path, saved, data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02(.",
        b"\x80\x02u.",
        b"\x80\x02h\x07.",
        b"\x80\x02\x82\x01.",  # EXT1: the extension registry of the process
        b"\x80\x02(cos\nsystem\no.",
        b"\x80\x02(X\x01\0\0\0xios\nsystem\n.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.",  # a terabyte
        b"\x80\x02ctorch\nSize\nX\x01\0\0\0x\x85R.",
        b"\x80\x02}]K\x01s.",  # a list for a key
        b"\x80\x02}" + b")\x85" + b"\x85" * 200_000 + b"K\x01s.",  # hashing it would overflow the stack
        b"\x80\x02}X\x01\0\0\0aX\x01\0\0\0bQs.",
        b"\x80\x02ccollections\nOrderedDict\n}b.",  # a state for a class
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
        b"\xff\xff\xff",
    ],
)
def test_broken_pickles(tmp_path: Path, saved: Path, data: bytes) -> None:
    before = dict(vars(torch._utils._rebuild_tensor_v2))
    text = opcodes(tmp_path, saved, data)
    assert "damaged or not a checkpoint" in text or "holds code" in text
    assert vars(torch._utils._rebuild_tensor_v2) == before


def test_add_safe_globals_loosens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1), "b": fractions.Fraction(1, 2)}, path)
    with torch.serialization.safe_globals([fractions.Fraction]):
        assert torch.load(path)["b"] == fractions.Fraction(1, 2)
        assert "fractions.Fraction" in refused(path)


def test_truncated_zip(tmp_path: Path, saved: Path) -> None:
    whole = saved.read_bytes()
    path = tmp_path / "cut.pt"
    for length in [0, 1, 4, 30, *range(100, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert "the zip is damaged" in refused(path) and "download complete" in refused(path)


def test_truncated_legacy(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole[:-3])
    text = refused(path)
    assert "is truncated in the storage" in text and f"found {len(whole) - 3} bytes" in text


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    """Any one byte changed: opened, or refused by CheckpointError; nothing else."""
    path = tmp_path / "x.pt"
    for zipped in FORMATS:
        torch.save({"a": torch.arange(3.0), "n": {"x": 1}}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for at in range(0, len(whole), 3 if zipped else 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
            try:
                checkpoint = open_checkpoint(path)
            except CheckpointError:
                continue
            for entry in checkpoint.values():
                assert 0 <= entry.start <= entry.end <= len(whole)


def entangled() -> dict[str, Any]:
    """Mappings that hold themselves, and each other many times over."""
    inner: dict[str, Any] = {}
    for _ in range(20):
        inner = dict.fromkeys(map(str, range(20)), inner)
    inner["again"] = {"self": inner, "model": {"w": torch.ones(1)}}
    inner["again"]["again"] = inner["again"]
    return inner


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize(
    ("value", "fragments"),
    [
        ({"state_dict": {"w": torch.ones(1)}, "epoch": 3}, ["is nested", "under 'state_dict'", "within='state_dict'"]),
        ({"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}}, ["under 'model', 'ema'"]),
        ({"a": {"b": {"w": torch.ones(1)}}}, ["under 'a'"]),
        ({"step": torch.ones(1), "model": {"w": torch.ones(1), "b": torch.ones(1)}}, ["'model'", "within='model'"]),
        ({"step": torch.ones(1), "a": {"b": {"w": torch.ones(1), "v": torch.ones(1)}}}, ["'a'", "within=('a', 'b')"]),
        (entangled(), ["under 'again'", "within=('again', 'model')"]),
        ({"epoch": 3, "loss": [1.0]}, ["holds no tensor", "2 values, none of them a tensor"]),
        ({}, ["holds no tensor", "an empty mapping"]),
        ([torch.ones(1)], ["is not a state dict", "found a list"]),
        (torch.ones(1), ["is not a state dict", "found one tensor"]),
        ({1: torch.ones(1)}, ["keys that are not strings", "the key 1"]),
        ({"s": torch.eye(2).to_sparse(), "w": torch.ones(1)}, ["s: is a sparse tensor"]),
        ({"s": torch.eye(2).to_sparse_csr()}, ["s: is a sparse tensor"]),
        ({"q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, ["q: is a quantised tensor"]),
        (
            {"w": torch.ones(1), "q": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), 1)},
            ["q: holds a value that weightlift cannot read; found a quantised tensor"],
        ),
        ({"m": torch.ones(2, device="meta")}, ["m: is a tensor on meta"]),
        ({"c": torch.ones(2, dtype=torch.cfloat).conj()}, ["is a conjugated or negated view", "tensor.resolve_conj"]),
    ],
)
def test_not_a_flat_state_dict(tmp_path: Path, zipped: bool, value: Any, fragments: list[str]) -> None:
    path = tmp_path / "x.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
    text = refused(path)
    for fragment in fragments:
        assert fragment in text


def test_a_single_problem_names_its_file_once(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": {"w": torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match="the state dict is nested") as caught:
        open_checkpoint(path)
    assert str(caught.value).count(str(path)) == 1 and caught.value.problems[0].file == path


def test_zip_records(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "x.pt"
    repack(saved, path)
    assert torch.equal(open_checkpoint(path).read("a"), torch.arange(6.0))
    repack(saved, path, byteorder=b"big")
    assert "wrong byte order; expected little; found big" in refused(path)
    repack(saved, path, **{"data/0": None})
    assert "the record 'data/0' is missing" in refused(path)
    repack(saved, path, **{"data/0": bytes(23)})
    assert "not of its storage's size; expected 24 bytes; found 23 bytes" in refused(path)
    repack(saved, path, **{"data/0": bytes(25)})
    assert "expected 24 bytes; found 25 bytes" in refused(path)
    repack(saved, path, compress=zipfile.ZIP_DEFLATED)
    assert "is compressed or encrypted" in refused(path) and "save it with torch.save" in refused(path)
    repack(saved, path, **{"data.pkl": None})
    assert "not one that torch.save writes" in refused(path)


def test_zip_headers_that_disagree(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "x.pt"
    whole = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        at = archive.getinfo("good/data/0").header_offset
    path.write_bytes(whole[:at] + b"XX" + whole[at + 2 :])
    assert "its header does not agree" in refused(path)
    path.write_bytes(whole[: at + 26] + struct.pack("<H", 5000) + whole[at + 28 :])
    assert "are not in the file" in refused(path)
    path.write_bytes(whole[: at + 30] + b"evil" + whole[at + 34 :])
    assert "has another name" in refused(path)


def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert "TorchScript archive, which holds code" in refused(path)


def test_views_out_of_their_storage(tmp_path: Path, saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        data = archive.read("good/data.pkl")
    path = tmp_path / "x.pt"
    shape = b"K\x06\x85"
    assert data.count(shape) == 1
    repack(saved, path, **{"data.pkl": data.replace(shape, b"K\x07\x85")})
    assert "lies beyond the end of its storage" in refused(path)
    repack(saved, path, **{"data.pkl": data.replace(shape, b"J\xff\xff\xff\xff\x85")})
    assert "are no tensor's; found shape [-1]" in refused(path)
    # A large count of the same element is a view of few bytes, and would be a large tensor.
    repack(saved, path, **{"data.pkl": data.replace(b"K\x06\x85q", b"\x8a\x08" + b"\0" * 7 + b"\x40\x85q")})
    assert "lies beyond" in refused(path)


def test_a_vast_expanded_view(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1).expand(2**62)}, path)
    assert "torch cannot hold this shape" in refused(path)


def test_legacy_storages(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(6.0)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    at = len(whole) - 32
    assert whole[at : at + 8] == struct.pack("<q", 6)
    for count in (5, 7, -1, 2**62):
        path.write_bytes(whole[:at] + struct.pack("<q", count) + whole[at + 8 :])
        text = refused(path)
        assert "is not of its size" in text and f"found {count}" in text and f"[{at}:{at + 8}]" in text


def test_a_pickle_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    assert "the magic number is wrong" in refused(path)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "an empty file"),
        (b"garbage " * 10, "80 bytes of something else"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "a Git LFS pointer to 12345 bytes"),
        (b"\n <!doctype HTML><html>", "an HTML page"),
        (b'{"error": "not found"}', "a JSON document"),
    ],
)
def test_something_else(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    text = refused(path)
    assert fragment in text and "is not a file of torch.save" in text


def test_tar_of_old(tmp_path: Path) -> None:
    import tarfile

    path = tmp_path / "x.pt"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "a tar archive" in refused(path)


def test_no_module_is_imported(tmp_path: Path, saved: Path) -> None:
    assert "antigravity" not in sys.modules
    assert "antigravity.x" in opcodes(tmp_path, saved, b"\x80\x02cantigravity\nx\n.")
    assert "antigravity" not in sys.modules


def test_keys_that_all_have_one_hash(tmp_path: Path) -> None:
    """A mapping of integers that are multiples of the modulus of Python's hash costs the square of their number."""
    path = tmp_path / "x.pt"
    step = 2**61 - 1
    torch.save({"a": torch.ones(1), "n": {number * step: None for number in range(20)}}, path)
    assert "a key that is an integer of more than 64 bits" in refused(path)
    torch.save({"a": torch.ones(1), "n": dict.fromkeys((-2 ** 63 + 1, 0, 2 ** 63 - 1))}, path)
    assert len(open_checkpoint(path).extras["n"]) == 3  # type: ignore[arg-type]
