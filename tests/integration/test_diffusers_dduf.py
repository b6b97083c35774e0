"""Pipelines in DDUF archives: the same pipeline as from the folder that was packed, and no file left."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import export_folder_as_dduf
from tests.parity import diffusers_pipelines as tiny
from tests.parity.compare import FellBack, native_only
from tests.parity.diffusers_compare import PIPELINE_ORIGINAL, pipeline_differences

import weightlift as wl


@pytest.fixture(scope="module", params=["flux", "stable_diffusion_xl"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dduf")
    saved = tiny.save(request.param, folder)
    (folder / "archive").mkdir()
    export_folder_as_dduf(folder / "archive" / "pipe.dduf", saved)
    return saved, folder / "archive"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=str)
def test_the_pipeline_of_an_archive(packed: tuple[Path, Path], temporary: Path, options: dict[str, Any]) -> None:
    saved, archive = packed
    with native_only():
        ours = wl.from_pretrained(DiffusionPipeline, archive, dduf_file="pipe.dduf", **options)
    theirs = PIPELINE_ORIGINAL.__func__(DiffusionPipeline, saved, **options)
    where = [
        item for item in pipeline_differences(ours, theirs)
        if not ("_name_or_path" in item or "name_or_path" in item or item.startswith("internal dict"))
    ]  # fmt: skip
    assert [item for item in where if "tokenizer" not in item] == []
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert os.listdir(temporary) == []
    names = [ours.vae.config["_name_or_path"], ours.text_encoder.config._name_or_path, ours.tokenizer.name_or_path]
    assert names == [f"{archive}/pipe.dduf/{part}" for part in ("vae", "text_encoder", "tokenizer")]
    assert ours.config["_name_or_path"] == archive


def test_components_that_are_passed_in_stay_as_they_are(packed: tuple[Path, Path]) -> None:
    saved, archive = packed
    given = {"vae": tiny.vae(), "text_encoder": transformers.CLIPTextModel.from_pretrained(saved / "text_encoder")}
    assert "_name_or_path" not in given["vae"].config
    pipe = wl.from_pretrained(DiffusionPipeline, archive, dduf_file="pipe.dduf", **given)
    assert pipe.vae is given["vae"] and "_name_or_path" not in pipe.vae.config
    assert pipe.text_encoder is given["text_encoder"]
    assert pipe.text_encoder.name_or_path == str(saved / "text_encoder")
    assert pipe.tokenizer.name_or_path == f"{archive}/pipe.dduf/tokenizer"


def test_what_is_not_native_is_unpacked(packed: tuple[Path, Path], temporary: Path) -> None:
    saved, archive = packed
    with pytest.raises(FellBack), native_only():
        wl.from_pretrained(DiffusionPipeline, archive, dduf_file="pipe.dduf", load_connected_pipeline=True)
    ours = wl.from_pretrained(DiffusionPipeline, archive, dduf_file="pipe.dduf", load_connected_pipeline=True)
    theirs = PIPELINE_ORIGINAL.__func__(DiffusionPipeline, saved)
    assert all(map(torch.equal, ours.vae.state_dict().values(), theirs.vae.state_dict().values()))
    assert os.listdir(temporary) == []


def test_through_the_drop_in(packed: tuple[Path, Path]) -> None:
    wl.install()
    try:
        pipe = DiffusionPipeline.from_pretrained(packed[1], dduf_file="pipe.dduf")
    finally:
        wl.uninstall()
    assert pipe.vae.dtype == torch.float32
    with pytest.raises(ValueError, match="no longer supported"):
        DiffusionPipeline.from_pretrained(packed[1], dduf_file="pipe.dduf")


def test_a_damaged_archive_is_refused(packed: tuple[Path, Path], temporary: Path) -> None:
    data = bytearray((packed[1] / "pipe.dduf").read_bytes())
    at = data.index(b'"_class_name"')
    data[at + 2] ^= 1
    (temporary / "bad").mkdir()
    (temporary / "bad" / "pipe.dduf").write_bytes(data)
    with pytest.raises(wl.CheckpointError, match=r"is damaged.*expected the checksum"):
        wl.from_pretrained(DiffusionPipeline, temporary / "bad", dduf_file="pipe.dduf")
    with pytest.raises(wl.CheckpointError, match="an archive of a whole pipeline"):
        wl.open_checkpoint(packed[1] / "pipe.dduf")
    assert os.listdir(temporary) == ["bad"]
