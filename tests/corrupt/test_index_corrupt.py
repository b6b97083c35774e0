"""Every way in which an index, or the set of files in a folder, can be wrong."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightlift.checkpoint import open_checkpoint, verify
from weightlift.errors import CheckpointError, CheckpointNotFound

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "one.safetensors")
    save_file({"c": torch.ones(1)}, folder / "two.safetensors")
    save_file({"z": torch.ones(1)}, tmp_path / "outside.safetensors")
    return folder


def write(folder: Path, weight_map: Any) -> Path:
    path = folder / INDEX
    path.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return path


GOOD = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def test_good(folder: Path) -> None:
    checkpoint = open_checkpoint(write(folder, GOOD))
    assert list(checkpoint) == ["a", "b", "c"] and verify(folder) == ()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../outside.safetensors", "leads out of the folder"),
        ("x/../../outside.safetensors", "leads out of the folder"),
        ("/etc/passwd", "absolute path"),
        ("~/outside.safetensors", "absolute path"),
        ("C:outside.safetensors", "names a drive"),
        ("c:/outside.safetensors", "names a drive"),
        ("..\\outside.safetensors", "has a backslash"),
        ("\\\\server\\share\\x.safetensors", "has a backslash"),
        ("nul", "names a device"),
        ("COM1.safetensors", "names a device"),
        ("sub/aux.safetensors", "names a device"),
        ("", "not a file name"),
        ("one.safetensors\0.txt", "not a file name"),
        (".", "not a regular file"),
    ],
)
def test_name_outside(folder: Path, name: str, why: str) -> None:
    path = write(folder, {**GOOD, "z": name})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert str(path) in text and why in text and "which is not allowed" in text
    assert "expected a file within the folder of the index" in text
    assert verify(folder) == caught.value.problems


def test_special_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "dev.safetensors").symlink_to("/dev/zero")
    write(folder, {**GOOD, "y": "pipe.safetensors", "z": "dev.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert [problem.what.count("not a regular file") for problem in caught.value.problems] == [1, 1]


def test_links(folder: Path, tmp_path: Path) -> None:
    os.rename(folder / "two.safetensors", folder / "real.safetensors")
    (folder / "two.safetensors").symlink_to("real.safetensors")
    write(folder, GOOD)
    assert list(open_checkpoint(folder)) == ["a", "b", "c"]
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(CheckpointError, match=r"'two\.safetensors', which is not allowed: it is a link to .*outside"):
        open_checkpoint(folder)
    # A linked folder is as good as the folder.
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors").symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert list(open_checkpoint(tmp_path / "link")) == ["a", "b", "c"]


def test_missing_file(folder: Path) -> None:
    write(folder, {**GOOD, "d": "three.safetensors", "e": "four.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert "a missing file, 'three.safetensors'" in text and "'four.safetensors'" in text and INDEX in text


def test_missing_key(folder: Path) -> None:
    write(folder, {**GOOD, "d": "two.safetensors", "e": "two.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert [problem.key for problem in caught.value.problems] == ["d", "e"]
    assert all(problem.file == folder / "two.safetensors" for problem in caught.value.problems)
    assert "lacks a key that the index promises" in str(caught.value)


def test_key_in_the_other_file(folder: Path) -> None:
    write(folder, {**GOOD, "c": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"found it is in .*two\.safetensors"):
        open_checkpoint(folder)


def test_two_files_hold_one_key(folder: Path) -> None:
    save_file({"c": torch.ones(1), "a": torch.ones(2)}, folder / "two.safetensors")
    for weight_map in (GOOD, None):
        if weight_map is None:
            (folder / INDEX).unlink()
        else:
            write(folder, weight_map)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        (problem,) = caught.value.problems
        assert problem.key == "a" and problem.what == "two shard files hold the key"
        assert problem.file == folder / "two.safetensors" and "one.safetensors" in str(problem.found)


def test_unlisted_keys_are_left_out_and_reported(folder: Path) -> None:
    write(folder, {"a": "one.safetensors", "c": "two.safetensors"})
    assert list(open_checkpoint(folder)) == ["a", "c"]
    (problem,) = verify(folder)
    assert problem.key == "b" and "does not list the key" in problem.what
    assert problem.file == folder / "one.safetensors" and INDEX in str(problem.expected)


def test_problems_of_all_files(folder: Path) -> None:
    write(folder, GOOD)
    for name in ("one.safetensors", "two.safetensors"):
        with open(folder / name, "ab") as stream:
            stream.write(b"x")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert [problem.file for problem in caught.value.problems] == [
        folder / "one.safetensors",
        folder / "two.safetensors",
    ]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[" * 100000, "nested too deeply"),
        ("[]", "is not an object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "names no file for the key"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "the index has the key twice"),
        ("<!DOCTYPE html><html>", "is an HTML page, not an index"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer to 9 bytes"),
    ],
)
def test_bad_index(folder: Path, text: str, fragment: str) -> None:
    path = folder / INDEX
    path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert fragment in str(caught.value) and str(path) in str(caught.value)


def test_several_indexes(folder: Path) -> None:
    write(folder, GOOD)
    (folder / "ema.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"several indexes.*found ema\.safetensors\.index\.json, model\.safe"):
        open_checkpoint(folder)
    assert len(open_checkpoint(folder / INDEX)) == 3


@pytest.mark.parametrize("name", ["model-{}-of-00004", "model.fp16-{}-of-00004", "model-{}-of-00004.fp16"])
def test_incomplete_set(tmp_path: Path, name: str) -> None:
    """Also of a variant, in whose files' names Diffusers once put it behind the numbers."""
    for number in (1, 2, 4):
        save_file({f"k{number}": torch.ones(1)}, tmp_path / f"{name.format(f'{number:05d}')}.safetensors")
    lacking = name.format("00003")
    with pytest.raises(CheckpointError, match=rf"1 of 4 shard files are missing; expected {re.escape(lacking)}\.safe"):
        open_checkpoint(tmp_path)
    save_file({"k3": torch.ones(1)}, tmp_path / f"{lacking}.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["k1", "k2", "k3", "k4"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"expected one of model\.safetensors, .*found an empty folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(CheckpointNotFound, match=r"found config\.json, training_args\.bin"):
        open_checkpoint(tmp_path)
    for missing in (tmp_path / "no", str(tmp_path / "no.safetensors"), "", "bert-base"):
        with pytest.raises(CheckpointNotFound, match="no such file or folder"):
            open_checkpoint(missing)
    (problem,) = verify(tmp_path / "no")
    assert problem.what == "no such file or folder"
    with pytest.raises(TypeError, match="cannot open a checkpoint from int"):
        open_checkpoint(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"from Linear; .* give its state_dict\(\)"):
        open_checkpoint(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"from BytesIO; .* the mapping that torch\.load makes of it"):
        open_checkpoint(io.BytesIO())  # type: ignore[arg-type]
