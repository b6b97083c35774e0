"""What is wrong with DDUF archives. Nothing is accepted that huggingface_hub's own parser refuses."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz_targets import archive_of, open_dduf, pipeline_members
from huggingface_hub import export_entries_as_dduf, read_dduf_file
from safetensors.torch import save

from weightlift.checkpoint.dduf import ArchivedFile, member_at, read_dduf, read_member, standing_for
from weightlift.checkpoint.gather import gather
from weightlift.errors import CheckpointChanged, CheckpointError, CheckpointNotFound

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def with_members(**changed: bytes | None) -> dict[str, bytes]:
    """The members of a pipeline, some replaced, added, or (None) left out."""
    names = {"index": "model_index.json", "config": "vae/config.json", "weights": WEIGHTS}
    made: dict[str, bytes | None] = dict(pipeline_members())
    made.update({names.get(name, name): content for name, content in changed.items()})
    return {name: content for name, content in made.items() if content is not None}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_dduf(path)
    assert caught.value.problems and all(problem.file == path for problem in caught.value.problems)
    return str(caught.value)


def test_members_are_where_the_official_parser_finds_them(tmp_path: Path) -> None:
    path = tmp_path / "x.dduf"
    export_entries_as_dduf(path, pipeline_members().items())
    ours, theirs = read_dduf(path), read_dduf_file(path)
    assert list(ours.members) == list(theirs)
    for name, entry in theirs.items():
        member = ours.members[name]
        assert (member.start, member.end) == (entry.offset, entry.offset + entry.length)
        if not name.endswith(".safetensors"):
            assert ours.read(name).decode() == entry.read_text()
    opened = open_dduf(path)
    assert torch.equal(opened.read(f"{WEIGHTS}:a"), torch.ones(2))
    assert list(ours.weights()) == [WEIGHTS]


BAD_CONTENT: dict[str, tuple[dict[str, bytes], str]] = {
    "no index": (with_members(index=None), "'model_index.json' is missing"),
    "an index that is no JSON": (with_members(index=b"{"), "is not JSON"),
    "an index that is no text": (with_members(index=b"\xff{}"), "is not JSON"),
    "an index that is no object": (with_members(index=b"[]"), "is not an object"),
    "an index nested too deeply": (with_members(index=b"[" * 100_000), "is not JSON"),
    "a folder that the index does not name": (with_members(index=b"{}"), "does not name the folder 'vae'"),
    "a folder without configuration": (with_members(config=None), "has no configuration"),
    "a suffix that is not allowed": (with_members(**{"vae/model.bin": b"x"}), "is none of"),
    "no suffix": (with_members(README=b"x"), "is none of"),
    "a suffix in upper case": (with_members(**{"x.JSON": b"x"}), "is none of"),
    "folders within folders": (with_members(**{"vae/a/config.json": b"{}"}), "folder within a folder"),
    "an absolute name": (with_members(**{"/config.json": b"{}"}), "leads elsewhere"),
    "an absolute name of two folders": (with_members(**{"/etc/x.json": b"{}"}), "absolute name"),
    "a way out": (with_members(**{"../x.json": b"{}"}), "leads elsewhere"),
    "a way out in disguise": (with_members(**{".. /x.json": b"{}"}), "leads elsewhere"),
    "the folder itself": (with_members(**{"./x.json": b"{}"}), "leads elsewhere"),
    "a backslash": (with_members(**{"vae\\x.json": b"{}"}), "character in its name"),
    "a file that is a folder": (with_members(**{"a.json": b"{}", "a.json/config.json": b"{}"}), "a file and a folder"),
    "weights that are none": (with_members(weights=b"\xff" * 20), "the header is too long"),
    "weights that are cut": (with_members(weights=save({"a": torch.ones(8)})[:-1]), "beyond the end of the file"),
    "weights with something behind": (with_members(weights=save({"a": torch.ones(8)}) + b"x"), "bytes after the last"),
}


@pytest.mark.parametrize("what", BAD_CONTENT)
def test_bad_content(what: str, tmp_path: Path) -> None:
    members, expected = BAD_CONTENT[what]
    assert expected in refusal(written(tmp_path / "x.dduf", archive_of(members)))


def _end(data: bytes) -> int:
    return data.rindex(b"PK\5\6")


def _twice(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for name, content in [*pipeline_members().items(), ("notes.txt", b"again")]:
            archive.writestr(name, content)
    return buffer.getvalue()


def _overlapping(data: bytes) -> bytes:
    """The record of the notes is that of the index, by its directory entry; names and sizes are made to agree."""
    at = data.index(b"notes.txt", data.index(b"PK\1\2")) - 46
    first = data.index(b"vae/config.json", data.index(b"PK\1\2")) - 46
    changed = bytearray(data)
    changed[at + 42 : at + 46] = struct.pack("<I", struct.unpack_from("<I", data, first + 42)[0])
    return bytes(changed)


def _encrypted(data: bytes) -> bytes:
    at = data.index(b"PK\1\2")
    return data[: at + 8] + bytes([data[at + 8] | 1]) + data[at + 9 :]


def _other_local_name(data: bytes) -> bytes:
    at = data.index(b"notes.txt")
    return data[:at] + b"nodes.txt" + data[at + 9 :]


def _longer_than_the_file(data: bytes) -> bytes:
    at = data.index(b"notes.txt", data.index(b"PK\1\2")) - 46
    return data[: at + 20] + struct.pack("<II", 1 << 30, 1 << 30) + data[at + 28 :]


def _other_byte(data: bytes) -> bytes:
    at = data.index(b'"_class_name"')
    return data[:at] + b"'" + data[at + 1 :]


BAD_ZIPS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[:-4], "the zip is damaged"),
    "empty": (lambda data: b"", "the zip is damaged"),
    "something before": (lambda data: b"x" + data, "the zip is damaged"),
    "something behind": (lambda data: data + b"x", "the zip is damaged"),
    "something between": (lambda data: data[: _end(data)] + b"PK" + data[_end(data) :], "the zip is damaged"),
    "a name twice": (_twice, "is there twice"),
    "records that overlap": (_overlapping, "another name"),
    "encryption": (_encrypted, "compressed or encrypted"),
    "a record whose header has another name": (_other_local_name, "another name"),
    "a record longer than the file": (_longer_than_the_file, "not in the file"),
    "another byte": (_other_byte, "expected the checksum"),
    "compression": (lambda data: archive_of(pipeline_members(), zipfile.ZIP_DEFLATED), "compressed or encrypted"),
}


@pytest.mark.parametrize("what", BAD_ZIPS)
def test_bad_zips(what: str, tmp_path: Path) -> None:
    change, expected = BAD_ZIPS[what]
    assert expected in refusal(written(tmp_path / "x.dduf", change(archive_of(pipeline_members()))))


def test_records_that_lie_within_others(tmp_path: Path) -> None:
    """A record whose bytes are a record: the directory must not reach the inner one."""
    whole = archive_of({"b.txt": b"text"})
    inner = whole[: whole.index(b"PK\1\2")]
    data = bytearray(archive_of({**pipeline_members(), "a.txt": inner, "b.txt": b"text"}))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at = data.index(b"b.txt", archive.start_dir + 1) - 46
    data[at + 42 : at + 46] = struct.pack("<I", data.index(inner))
    path = written(tmp_path / "x.dduf", bytes(data))
    assert "overlaps 'a.txt'" in refusal(path)
    assert read_dduf_file(path)["b.txt"].read_text() == "text"


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        read_dduf(tmp_path / "x.dduf")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_dduf(tmp_path)


def test_an_archive_that_changed(tmp_path: Path) -> None:
    path = written(tmp_path / "x.dduf", archive_of(pipeline_members()))
    archive = read_dduf(path)
    written(path, archive_of(with_members(**{"more.txt": b"more"})))
    with pytest.raises(CheckpointChanged):
        archive.read("notes.txt")
    with pytest.raises(CheckpointChanged):
        read_member(archive.members[WEIGHTS])
    with pytest.raises(KeyError):
        archive.read("nothing.txt")


def test_a_member_stands_for_a_file_in_its_context_only(tmp_path: Path) -> None:
    archive = read_dduf(written(tmp_path / "x.dduf", archive_of(pipeline_members())))
    place = tmp_path / "model.safetensors"
    member: ArchivedFile = archive.members[WEIGHTS]
    with standing_for({place: member}):
        gathered = gather((place,), is_index=False)
        assert not gathered.problems and {entry.file for entry in gathered.entries.values()} == {tmp_path / "x.dduf"}
    assert member_at(place) is None
    assert gather((place,), is_index=False).missing
