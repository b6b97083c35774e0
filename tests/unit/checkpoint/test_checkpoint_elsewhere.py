"""What is no checkpoint of ours: the error says whose it is and what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy
import pytest

import weightlift as wl


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["model_index.json", "unet/"], r"wl\.from_pretrained\(DiffusionPipeline, …\)"),
        (["latest", "zero_to_fp32.py", "global_step10/"], r"zero_to_fp32\.py in it"),
        (["model.Q4_0.gguf"], "does not read GGUF"),
        (["tf_model.h5", "config.json"], "convert them to safetensors"),
        (["flax_model.msgpack"], "convert them to safetensors"),
        (["last.ckpt"], "pass the path of the file itself"),
        (["checkpoint-5/", "checkpoint-10/", ".git/"], r"found no file — .*you mean of checkpoint-10, checkpoint-5$"),
        (["config.json"], r"found config\.json$"),
        ([], "found an empty folder$"),
    ],
)  # fmt: skip
def test_a_folder_of_something_else(tmp_path: Path, names: list[str], hint: str) -> None:
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(wl.CheckpointNotFound, match=hint):
        wl.open_checkpoint(tmp_path)


def test_files_of_numpy(tmp_path: Path) -> None:
    numpy.save(tmp_path / "one.npy", numpy.zeros(3))
    numpy.savez(tmp_path / "some.npz", weight=numpy.zeros(3))
    for name in ("one.npy", "some.npz"):
        with pytest.raises(wl.CheckpointError, match=r"read it with numpy\.load, and pass a mapping of tensors"):
            wl.open_checkpoint(tmp_path / name)


def test_another_zip_is_not_called_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as archive:
        archive.writestr("a.txt", "a")
        archive.writestr("b/c.txt", "c")
    with pytest.raises(wl.CheckpointError, match=r"not one that torch\.save writes.*found a\.txt, b/c\.txt"):
        wl.open_checkpoint(tmp_path / "notes.zip")


def test_a_home_is_not_looked_up() -> None:
    with pytest.raises(wl.CheckpointNotFound, match=r"os\.path\.expanduser"):
        wl.open_checkpoint("~/nothing/model.safetensors")
