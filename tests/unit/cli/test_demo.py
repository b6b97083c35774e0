"""The demo, small: every check passes, nothing is left behind, and a failed check is an exit code."""

from __future__ import annotations

import json
import re

import pytest
import torch

from weightlift.cli import demo, demo_measure, demo_model

SMALL = ("demo", "--size-mb", "2", "--rounds", "1")


def test_demo(here, run, monkeypatch):
    monkeypatch.setattr(demo, "_TIMING_SECONDS", 0.0)
    code, out, err = run(*SMALL, "--folder", "made/here", "--threads", "3")
    assert (code, err) == (0, "")
    assert not (here / "made" / "here").exists()
    assert out.count("✓") == 5
    assert "✗" not in out
    assert re.search(r"^tied +lm_head\.weight .*= embed\.weight", out, re.M)
    assert re.search(r"^kept +rotary\.cos", out, re.M)
    assert "outputs equal to the reference's, bit for bit: 3 of 3 right" in out
    assert re.search(r"build, then load_state_dict +\d+\.\d{3} s", out)
    assert len(out.splitlines()) <= 60
    assert max(map(len, out.splitlines())) <= 160


def test_a_failed_check_is_1(here, run, monkeypatch):
    write = demo_model.write_checkpoint

    def spoiled(model, folder, **options):
        paths = write(model, folder, **options)
        with open(paths[-1], "r+b") as stream:
            stream.seek(-4, 2)
            stream.write(b"\0\0\x80\x7f")
        return paths

    monkeypatch.setattr(demo_model, "write_checkpoint", spoiled)
    monkeypatch.setattr(demo_measure, "memory_of", lambda *_: None)
    folder = here / "kept"
    folder.mkdir()
    code, out, _ = run(*SMALL, "--folder", str(folder))
    assert code == 1
    assert "✗ weights and buffers bit-equal" in out
    assert "checks failed" in out
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made(here, run):
    (here / "file").write_text("")
    code, _, err = run(*SMALL, "--folder", "file/below")
    assert code == 2
    assert err.startswith("weightlift demo: --folder: ")


@pytest.mark.parametrize("megabytes", [2, 4, 500])
def test_sizes(megabytes):
    config = demo_model.Config.of_size(megabytes)
    with torch.device("meta"):
        model = demo_model.Decoder(config)
    assert sum(parameter.nbytes for parameter in model.parameters()) == pytest.approx(megabytes * 1e6, rel=0.25)


def test_the_checkpoint_lacks_the_head_and_the_tables(tmp_path):
    config = demo_model.Config.of_size(1)
    done = []
    files = demo_model.write_checkpoint(demo_model.reference(config), tmp_path, files=3, progress=done.append)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) == 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert sum(done) == index["metadata"]["total_size"]
    assert not {"lm_head.weight", "rotary.cos"} & index["weight_map"].keys()
