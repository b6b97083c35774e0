"""What is no checkpoint of ours: the error says whose it is and what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

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
    arrays = numpy.load(tmp_path / "some.npz")
    with pytest.raises(wl.CheckpointError, match=r"2 values, none of them a tensor — torch\.from_numpy makes"):
        wl.open_checkpoint({**arrays, "note": "x"})
    assert wl.open_checkpoint({key: torch.from_numpy(arrays[key]) for key in arrays})["weight"].shape == (3,)


def test_another_zip_is_not_called_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as archive:
        archive.writestr("a.txt", "a")
        archive.writestr("b/c.txt", "c")
    with pytest.raises(wl.CheckpointError, match=r"not one that torch\.save writes.*found a\.txt, b/c\.txt"):
        wl.open_checkpoint(tmp_path / "notes.zip")


@pytest.mark.parametrize("address", ["https://huggingface.co/x/y/resolve/main/model.safetensors", "s3://x/model.pt"])
def test_an_address_is_not_taken_for_a_wrong_hub_id(address: str) -> None:
    with pytest.raises(wl.CheckpointNotFound, match="addresses are not read: fetch the file"):
        wl.open_checkpoint(address)


def test_of_two_files_with_the_same_keys_one_is_to_be_passed(tmp_path: Path) -> None:
    for name in ("epoch-1.safetensors", "epoch-2.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(wl.CheckpointError, match=r"two shard files hold the key.* — pass the path of the file"):
        wl.open_checkpoint(tmp_path)


def test_hints_on_tensors_that_are_not_plain_work(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    odd = {"sparse": torch.eye(2).to_sparse(), "quantised": quantised}
    torch.save(odd, tmp_path / "odd.pt")
    with pytest.raises(wl.CheckpointError) as caught:
        wl.open_checkpoint(tmp_path / "odd.pt")
    assert {problem.hint for problem in caught.value.problems} == {"pass the mapping that torch.load makes of the file"}
    with pytest.raises(wl.CheckpointError) as caught:
        wl.open_checkpoint(torch.load(tmp_path / "odd.pt"))
    assert [str(problem.hint).partition(" ")[0] for problem in caught.value.problems] == [
        "tensor.to_dense()", "tensor.dequantize()",
    ]  # fmt: skip
    plain = wl.open_checkpoint({"sparse": odd["sparse"].to_dense(), "quantised": quantised.dequantize()})
    assert set(plain) == set(odd)


def test_a_home_is_not_looked_up() -> None:
    with pytest.raises(wl.CheckpointNotFound, match=r"os\.path\.expanduser"):
        wl.open_checkpoint("~/nothing/model.safetensors")
