"""Weights that a device map keeps on disk: the same files, hooks and outputs as Transformers', natively."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity.compare import FellBack, native_only
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import weightlift as wl

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
SOME = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip
HEADS = {**SOME, "model.embed_tokens": "disk", "lm_head": "disk"}
TOKENS = torch.arange(6)[None]


def save(folder: Path, kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "experts":
        MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).save_pretrained(folder)
        return MixtralForCausalLM
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    model.save_pretrained(folder, max_shard_size=10_000 if kind == "sharded" else "1GB")
    if kind == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return LlamaForCausalLM


def both(cls: Any, folder: Path, places: dict[str, str], tmp_path: Path, **options: Any) -> tuple[Any, Any]:
    theirs, expected = cls.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "theirs", output_loading_info=True, **options
    )
    with native_only():
        ours, info = wl.from_pretrained(
            cls, folder, device_map=places, offload_folder=tmp_path / "ours", output_loading_info=True, **options
        )
    assert info == expected
    return ours, theirs


def files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("places", [SOME, HEADS], ids=["layers", "tied heads too"])
@pytest.mark.parametrize("kind", ["plain", "sharded", "pickle", "experts"])
def test_the_same_as_transformers(tmp_path: Path, kind: str, places: dict[str, str], dtype: torch.dtype) -> None:
    cls = save(tmp_path / "saved", kind)
    ours, theirs = both(cls, tmp_path / "saved", places, tmp_path, dtype=dtype)
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert {name: (p.device, p.dtype, p.shape) for name, p in found.items()} == {
        name: (p.device, p.dtype, p.shape) for name, p in expected.items()
    }
    mine, other = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name][key], other[name][key]) for name in mine for key in mine[name])
    assert bool(mine) == (kind in ("pickle", "experts"))
    assert ours.hf_device_map == theirs.hf_device_map
    whole = cls.from_pretrained(tmp_path / "saved", dtype=dtype)  # theirs fails with a pickle and tied heads
    for _ in range(2):
        assert torch.equal(ours(TOKENS).logits, whole(TOKENS).logits)


def test_what_the_checkpoint_lacks_is_initialised_and_written(tmp_path: Path) -> None:
    """Transformers can't run such a model: the initial value is in no file."""
    cls = save(tmp_path / "saved", "plain")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    missing = "model.layers.2.mlp.up_proj.weight"
    del state[missing]
    save_file(state, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    ours, _ = both(cls, tmp_path / "saved", SOME, tmp_path)
    (values,) = files(tmp_path / "ours").values()
    assert 0.01 < values[missing].std() < 0.03
    assert torch.equal(values[missing], wl.from_pretrained(cls, tmp_path / "saved").get_parameter(missing))
    assert ours(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("places", [SOME, HEADS], ids=["layers", "tied heads too"])
@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_no_folder_is_needed_where_nothing_is_written(
    tmp_path: Path, kind: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = save(tmp_path / "saved", kind)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with native_only():
        ours = wl.from_pretrained(cls, tmp_path / "saved", device_map=places)
    theirs = cls.from_pretrained(tmp_path / "saved", device_map=places)
    assert [p.device for p in ours.parameters()] == [p.device for p in theirs.parameters()]
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("kind", ["pickle", "experts", "lacking"])
def test_a_folder_is_asked_for_where_something_is_written(tmp_path: Path, kind: str) -> None:
    cls = save(tmp_path / "saved", kind)
    if kind == "lacking":
        state = load_file(tmp_path / "saved" / "model.safetensors")
        del state["model.norm.weight"]
        save_file(state, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    else:  # with the other, Transformers gives a model that cannot run
        with pytest.raises(ValueError, match="provide an `offload_folder`"):
            cls.from_pretrained(tmp_path / "saved", device_map=SOME)
    with pytest.raises(ValueError, match="has to be written anew") as caught:
        wl.from_pretrained(cls, tmp_path / "saved", device_map=SOME)
    assert isinstance(caught.value, wl.PlanError)
    assert "offload_folder=" in str(caught.value)


def test_an_offloaded_model_is_saved_as_it_was(tmp_path: Path) -> None:
    cls = save(tmp_path / "saved", "experts")
    ours, _ = both(cls, tmp_path / "saved", SOME, tmp_path)
    ours.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_buffers_go_where_they_are_told(tmp_path: Path) -> None:
    cls = save(tmp_path / "saved", "plain")
    ours, theirs = both(cls, tmp_path / "saved", SOME, tmp_path, offload_buffers=True)
    assert [b.device for b in ours.buffers()] == [b.device for b in theirs.buffers()]
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)


def test_under_inference_mode_its_parameters_are_ordinary_ones(tmp_path: Path) -> None:
    cls = save(tmp_path / "saved", "plain")
    with torch.inference_mode(), native_only():
        model = wl.from_pretrained(
            cls, tmp_path / "saved", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
        )
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_what_is_not_native_is_still_right(tmp_path: Path) -> None:
    """A tie of which one name is on disk and the other in memory."""
    cls = save(tmp_path / "saved", "plain")
    places = {**SOME, "lm_head": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    theirs = cls.from_pretrained(tmp_path / "saved", **options)
    with pytest.raises(FellBack, match="on disk in part"), native_only():
        ours = wl.from_pretrained(cls, tmp_path / "saved", **options)
    assert [p.device for p in ours.parameters()] == [p.device for p in theirs.parameters()]


def test_what_is_not_native_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cls = save(tmp_path / "saved", "plain")
    file = tmp_path / "saved" / "model.safetensors"
    save_file({**load_file(file), "more": torch.ones(2)}, file, metadata={"format": "pt"})
    places = {**SOME, "lm_head": "disk"}
    wl.from_pretrained(cls, tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offloaded")
    assert len({id(record) for record in caplog.records if "LOAD REPORT" in record.getMessage()}) == 1


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    cls, full = save(tmp_path / "model", "experts"), tmp_path / "full"
    full.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(full)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(wl.TransferError, match="not enough room on the disk"), native_only():
            wl.from_pretrained(cls, tmp_path / "model", device_map=SOME, offload_folder=full)
        assert not list(full.iterdir())
    finally:
        subprocess.run(["umount", str(full)], check=True)
