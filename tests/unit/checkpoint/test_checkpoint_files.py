"""Opening and reading real files: what comes back is what was saved."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import weightlift as wl
from weightlift import dtypes
from weightlift.checkpoint import Checkpoint, open_checkpoint
from weightlift.checkpoint.entry import TensorEntry
from weightlift.errors import CheckpointChanged, CheckpointError, CheckpointNotFound


def bits(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    return bytes(tensor.untyped_storage())[: tensor.numel() * tensor.dtype.itemsize]  # type: ignore[call-overload]


def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert mine.is_contiguous() and mine.storage_offset() == 0 and not mine.requires_grad
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype and bits(mine) == bits(theirs.detach().clone())


def all_dtypes() -> dict[str, torch.Tensor]:
    made = {}
    for name, dtype in dtypes.TORCH.items():
        raw = torch.randint(0, 2, (3, 4, dtype.itemsize), dtype=torch.uint8)
        made[name] = raw.view(dtype).reshape(3, 4)
        made[f"{name}.zero"] = torch.empty(2, 0, dtype=dtype)
        if name != "F4":
            made[f"{name}.scalar"] = made[name][0, 0].clone()
    return made


def test_safetensors_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = all_dtypes()
    save_file(tensors, path, {"format": "pt", "who": "é"})
    checkpoint = open_checkpoint(path)
    raw = path.read_bytes()
    assert set(checkpoint) == set(tensors) and checkpoint.metadata == {"format": "pt", "who": "é"}
    for key, tensor in load_file(path).items():
        entry = checkpoint[key]
        assert isinstance(entry, TensorEntry) and entry.key == key and entry.file == path and entry.stride is None
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert entry.end - entry.start == entry.nbytes and raw[entry.start : entry.end] == bits(tensor)
        assert same(checkpoint.read(key), tensor), key
    assert checkpoint.total_bytes == sum(t.numel() * t.dtype.itemsize for t in tensors.values())
    (file,) = checkpoint.files
    status = path.stat()
    assert (file.path, file.format) == (path, "safetensors")
    assert (file.size_bytes, file.mtime_ns, file.inode, file.device) == (
        status.st_size,
        status.st_mtime_ns,
        status.st_ino,
        status.st_dev,
    )


@pytest.mark.parametrize("name", ["7e9547a88383407bfd4ec7d0425532db", "flux.sft", "x.SAFETENSORS", "pytorch_model.bin"])
def test_safetensors_of_another_name(tmp_path: Path, name: str) -> None:
    """The blob that a link of the hub's cache resolves to has no suffix; some publishers have another."""
    path = tmp_path / name
    net = nn.Linear(2, 3)
    save_file(net.state_dict(), path, {"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.files[0].format == "safetensors" and checkpoint.metadata == {"format": "pt"}
    assert torch.equal(wl.load(lambda: nn.Linear(2, 3), path).weight, net.weight)
    with pytest.raises(CheckpointError, match="holds tensors and no mappings"):
        open_checkpoint(path, within="state_dict")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="lies beyond the end of the file"):
        open_checkpoint(path)


def state() -> dict[str, object]:
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "kept by torch, not a weight"  # type: ignore[attr-defined]
    return {
        "base": base,
        "tied": base,
        "transposed": base.t(),
        "column": base[:, 2],
        "rows": base[1:3],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "one": base[2:3, ::6],
        "zero": torch.empty(0, 3),
        "zero_view": base[4:],
        "scalar": torch.tensor(3),
        "parameter": parameter,
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "c128": torch.ones(2, dtype=torch.complex128),
        "bool": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("kind", ["zip", "legacy", "protocol4"])
def test_torch_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.pt"
    saved = state()
    if kind != "legacy":  # torch cannot load these from its legacy format
        saved.update({key: t for key, t in all_dtypes().items() if key.split(".")[0] not in ("F32", "I64")})
    torch.save(
        saved, path, _use_new_zipfile_serialization=kind != "legacy", pickle_protocol=4 if kind == "protocol4" else 2
    )
    checkpoint = open_checkpoint(path)
    assert list(checkpoint) == list(saved)
    raw = path.read_bytes()
    loaded = saved if kind == "protocol4" else torch.load(path)
    for key, tensor in loaded.items():
        assert same(checkpoint.read(key), tensor), key
        entry = checkpoint[key]
        if entry.stride is None:
            assert raw[entry.start : entry.end] == bits(tensor), key
    base, tied = checkpoint["base"], checkpoint["tied"]
    assert (base.start, base.end) == (tied.start, tied.end)
    assert checkpoint["transposed"].stride == (1, 6) and checkpoint["transposed"].start == base.start
    column = checkpoint["column"]
    assert column.stride == (6,) and (column.start - base.start, column.end - base.start) == (8, 8 + 4 * 19)
    rows = checkpoint["rows"]
    assert rows.stride is None and (rows.start - base.start, rows.end - base.start) == (24, 72)
    expanded = checkpoint["expanded"]
    assert expanded.stride == (1, 0) and expanded.end - expanded.start == 12 and expanded.nbytes == 48
    assert checkpoint["one"].stride is None
    assert checkpoint.files[0].format == ("torch-legacy" if kind == "legacy" else "torch")


@pytest.mark.parametrize("zipped", [True, False])
def test_extras_and_versions(tmp_path: Path, zipped: bool) -> None:
    class Extra(torch.nn.BatchNorm1d):
        def get_extra_state(self) -> object:
            return {"t": torch.arange(3.0), "l": [1, (2.5, None)], "b": b"\xff", "s": {1}, "c": 1j, "d": torch.float32}

        def set_extra_state(self, state: object) -> None:
            self.extra = state

    path = tmp_path / "x.pt"
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), Extra(2))
    saved = module.state_dict()
    saved["epoch"] = 3
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.extras) == {"1._extra_state", "epoch"} and checkpoint.extras["epoch"] == 3
    assert "1._extra_state" in checkpoint.extras and len(checkpoint.extras) == 2
    extra = checkpoint.extras["1._extra_state"]
    assert isinstance(extra, dict)
    assert torch.equal(extra.pop("t"), torch.arange(3.0))
    assert extra == {"l": [1, (2.5, None)], "b": b"\xff", "s": {1}, "c": 1j, "d": torch.float32}
    assert "t" in checkpoint.extras["1._extra_state"], "each access is a new copy"  # type: ignore[operator]
    versions = checkpoint.state_dict_metadata
    assert versions is not None and {k: dict(v) for k, v in versions.items()} == saved._metadata  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        versions[""]["version"] = 9  # type: ignore[index]


def test_self_referring_extra(tmp_path: Path) -> None:
    loop: list[object] = [1]
    loop.append(loop)
    torch.save({"a": torch.ones(1), "x": loop}, tmp_path / "x.pt")
    copy = open_checkpoint(tmp_path / "x.pt").extras["x"]
    assert isinstance(copy, list) and copy[1] is copy and copy is not loop


def test_mapping() -> None:
    module = torch.nn.BatchNorm1d(2)
    module.weight.data = torch.arange(4.0)[::2]
    source = module.state_dict()
    source["k_extra_state"] = {"t": torch.ones(1)}
    checkpoint = open_checkpoint(source)
    assert open_checkpoint(checkpoint) is checkpoint
    assert list(checkpoint) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert (
        checkpoint.tensors["weight"] is source["weight"] and checkpoint.files == () and checkpoint.source == "<mapping>"
    )
    assert checkpoint["weight"] == TensorEntry("weight", (2,), torch.float32, None, 0, 8, (2,))
    read = checkpoint.read("weight")
    assert same(read, source["weight"]) and read.data_ptr() != source["weight"].data_ptr()
    assert checkpoint.state_dict_metadata == {"": {"version": 2}}
    assert checkpoint.extras["k_extra_state"] is source["k_extra_state"]
    assert len(open_checkpoint({})) == 0


def test_mappings_beside_the_weights(tmp_path: Path) -> None:
    """What an optimiser holds makes a state dict no nested one: to ``load_state_dict`` it is an unexpected key."""
    source: dict[str, Any] = nn.Linear(2, 2).state_dict()
    state = {n: {"step": torch.tensor(1.0), "exp_avg": torch.full((2, 2), float(n))} for n in range(2)}
    source["optimizer"] = {"state": state, "lr": 0.1}
    source["ema"] = {name: tensor + 1 for name, tensor in nn.Linear(2, 2).state_dict().items()}
    torch.save(source, tmp_path / "x.pt")
    for checkpoint in (open_checkpoint(tmp_path / "x.pt"), open_checkpoint(source)):
        assert set(checkpoint) == {"weight", "bias"} and set(checkpoint.extras) == {"optimizer", "ema"}
        kept: Any = checkpoint.extras["optimizer"]
        assert same(kept["state"][1]["exp_avg"], state[1]["exp_avg"]) and kept["lr"] == 0.1
        loaded = wl.load(lambda: nn.Linear(2, 2), checkpoint, strict=False)
        assert same(loaded.weight.detach(), source["weight"])
        with pytest.raises(wl.PlanError, match="no place for 2 values beside the tensors: optimizer, ema") as caught:
            wl.load(lambda: nn.Linear(2, 2), checkpoint)
        first, *rest = caught.value.problems
        assert {problem.key for problem in rest if problem.implied} == {"optimizer", "ema"}
        drop = eval(str(first.hint).partition("key_mapping=")[2])
        assert same(wl.load(lambda: nn.Linear(2, 2), checkpoint, key_mapping=drop).weight.detach(), source["weight"])
    del source["ema"]
    with pytest.raises(wl.PlanError, match="optimizer: the module has no place for this") as caught:
        wl.load(lambda: nn.Linear(2, 2), source)
    (problem,) = caught.value.problems
    drop = eval(str(problem.hint).partition("key_mapping=")[2])
    assert same(wl.load(lambda: nn.Linear(2, 2), source, key_mapping=drop).weight.detach(), source["weight"])


def test_an_optimiser_is_known_by_what_it_holds(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    adam = torch.optim.AdamW(module.parameters())
    module(torch.ones(2)).sum().backward()
    adam.step()
    torch.save({**module.state_dict(), "adam": adam.state_dict()}, tmp_path / "flat.pt")
    assert set(wl.open_checkpoint(tmp_path / "flat.pt")) == {"weight", "bias"}
    torch.save({"adam": adam.state_dict(), "net": {"a": module.state_dict()}}, tmp_path / "nested.pt")
    with pytest.raises(CheckpointError, match=r"within=\('net', 'a'\)"):
        wl.open_checkpoint(tmp_path / "nested.pt")
    torch.save({"adam": adam.state_dict()}, tmp_path / "alone.pt")
    with pytest.raises(CheckpointError, match="weights, which are in another file"):
        wl.open_checkpoint(tmp_path / "alone.pt")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": {"b": torch.ones(1)}}, "the state dict is nested"),
        ({1: torch.ones(1)}, "keys that are not strings"),
        ({"a": 1}, "holds no tensor"),
        ({"a": torch.ones(1, device="meta")}, "a: is a tensor on meta"),
        ({"a": TwoTensor(torch.ones(2), torch.ones(2))}, "a: is a TwoTensor, a tensor made of others"),
        ({"a": torch.eye(2).to_sparse()}, "a: is a sparse tensor"),
    ],
)
def test_bad_mapping(value: dict[str, object], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(value)  # type: ignore[arg-type]


def test_is_a_readonly_mapping(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, path)
    checkpoint = open_checkpoint(str(path))
    assert isinstance(checkpoint, Checkpoint) and len(checkpoint) == 2 and "a" in checkpoint and "z" not in checkpoint
    assert repr(checkpoint) == f"<Checkpoint {path}: 2 tensors, 1 file, 20 bytes>" and checkpoint.source == str(path)
    with pytest.raises(AttributeError):
        checkpoint.files = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        checkpoint["c"] = checkpoint["a"]  # type: ignore[index]
    with pytest.raises(KeyError):
        checkpoint.read("z")


def test_relative_path_survives_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(".")
    monkeypatch.chdir("/")
    assert checkpoint.read("a").tolist() == [1.0, 1.0]


def test_changed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    whole = path.read_bytes()

    def check(text: str) -> None:
        with pytest.raises(CheckpointChanged, match=text) as caught:
            checkpoint.read("a")
        assert all(problem.file == path for problem in caught.value.problems)

    checkpoint = open_checkpoint(path)
    os.truncate(path, len(whole) - 1)
    check(f"expected size in bytes {len(whole)}, .*; found {len(whole) - 1}, ")
    path.write_bytes(whole)
    os.utime(path, ns=(1, 1))
    checkpoint = open_checkpoint(path)
    os.utime(path, ns=(2, 2))
    check("expected modification time in ns 1; found 2")
    other = tmp_path / "other"
    other.write_bytes(whole)
    checkpoint = open_checkpoint(path)
    os.utime(other, ns=(2, 2))
    os.replace(other, path)
    check("expected device and inode ")
    checkpoint = open_checkpoint(path)
    path.unlink()
    with pytest.raises(CheckpointNotFound, match="no such file"):
        checkpoint.read("a")


def test_short_read(tmp_path: Path) -> None:
    """A file cut between the look at it and the read: the reader itself notices."""
    from weightlift.checkpoint.reader import read_tensor

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    checkpoint = open_checkpoint(path)
    entry = checkpoint["a"]
    beyond = TensorEntry("a", (4,), torch.float32, path, entry.start, entry.start + 16)
    with pytest.raises(CheckpointError, match="ends too early; expected 16 bytes; found 8 bytes") as caught:
        read_tensor(checkpoint.files[0], beyond)
    problem = caught.value.problems[0]
    assert (problem.file, problem.start, problem.end) == (path, entry.start, entry.start + 16)


def test_ambient_torch_state_does_not_matter(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(2, 3).t()}, tmp_path / "x.pt")
    for name in ("model.safetensors", "x.pt"):
        for mode in (torch.device("meta"), FakeTensorMode(), torch.inference_mode()):
            with mode:
                read = open_checkpoint(tmp_path / name).read("a")
            assert type(read) is torch.Tensor and read.device.type == "cpu" and read.sum() in (2, 6)


def test_threads_and_descriptors(tmp_path: Path) -> None:
    for number in range(4):
        save_file({f"{number}.{i}": torch.full((50,), float(i)) for i in range(20)}, tmp_path / f"{number}.safetensors")
    torch.save({str(i): torch.full((50,), float(i)) for i in range(20)}, tmp_path / "x.pt")
    shared = open_checkpoint(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    start = threading.Barrier(8)

    def work(_: int) -> bool:
        start.wait()
        own, pickled = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "x.pt")
        return all(
            source.read(key).eq(float(key.split(".")[-1])).all() for source in (shared, own, pickled) for key in source
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    for _ in range(3):
        (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_folder_preference(tmp_path: Path) -> None:
    """Each step adds what is preferred to all before it."""

    def key() -> list[str]:
        return list(open_checkpoint(tmp_path))

    for ignored in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "._model.safetensors"):
        (tmp_path / ignored).write_bytes(b"x")
    torch.save({"pt": torch.ones(1)}, tmp_path / "samplernet.pt")  # no word of a trainer's
    assert key() == ["pt"]
    torch.save({"bin": torch.ones(1)}, tmp_path / "a.bin")
    assert key() == ["bin", "pt"]
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"bin": "a.bin"}}')
    assert key() == ["bin"]
    torch.save({"whole": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert key() == ["whole"]
    save_file({"s1": torch.ones(1)}, tmp_path / "s1.safetensors")
    assert key() == ["s1"]
    save_file({"s2": torch.ones(1), "s0": torch.ones(1)}, tmp_path / "s2.safetensors")
    assert set(key()) == {"s1", "s2", "s0"} and key()[0] == "s1"
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"s2": "s2.safetensors"}}')
    assert key() == ["s2"]
    save_file({"d": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert key() == ["d"]
    save_file({"m": torch.ones(1)}, tmp_path / "model.safetensors")
    assert key() == ["m"]


def test_sharded_bin_and_order(tmp_path: Path) -> None:
    torch.save({"z": torch.ones(1), "a": torch.ones(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save({"y": torch.ones(3)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    names = {"a": "pytorch_model-00002-of-00002.bin", "y": "pytorch_model-00001-of-00002.bin"}
    import json

    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {**names, "z": names["a"]}}))
    for source in (tmp_path, index):
        checkpoint = open_checkpoint(source)
        assert list(checkpoint) == ["y", "z", "a"]
        assert [file.path.name for file in checkpoint.files] == sorted(names.values())
        assert checkpoint.read("a").tolist() == [1.0, 1.0]


def test_many_tensors_open_fast(tmp_path: Path) -> None:
    """20,000 tensors; generous, to notice only what is not linear."""
    import json
    import struct
    import time

    header = {f"layers.{i}.w": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(20_000)}
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(20_000))
    began = time.perf_counter()
    assert len(open_checkpoint(tmp_path)) == 20_000
    assert time.perf_counter() - began < 5


def test_other_values_across_files(tmp_path):
    """An index leaves out what it does not name, extra state aside; a key is a tensor in all files or in none."""
    torch.save({"a": torch.ones(2), "epoch": 3, "m._extra_state": {"n": 1}}, tmp_path / "1.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "2.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}}))
    assert dict(open_checkpoint(index).extras) == {"m._extra_state": {"n": 1}}
    torch.save({"b": torch.ones(2), "a": "no tensor"}, tmp_path / "2.bin")
    with pytest.raises(CheckpointError, match="two shard files hold the key"):
        open_checkpoint(index)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy", "mapping"])
def test_it_can_be_given_to_another_process(tmp_path: Path, kind: str) -> None:
    class Counts(nn.BatchNorm1d):
        def get_extra_state(self) -> dict[str, object]:
            return {"seen": torch.arange(3), "of": [4]}

        def set_extra_state(self, state: dict[str, Any]) -> None:
            self.got = state["seen"].tolist(), state["of"]

    state: Any = Counts(3).state_dict()
    if kind == "safetensors":
        del state["_extra_state"]
        save_file(state, tmp_path / "m.safetensors", metadata={"by": "me"})
    elif kind != "mapping":
        torch.save(state, tmp_path / "m", _use_new_zipfile_serialization=kind == "torch")
    opened = open_checkpoint(state if kind == "mapping" else next(tmp_path.iterdir()))
    for again in (pickle.loads(pickle.dumps(opened)), copy.deepcopy(opened)):
        assert dict(again) == dict(opened) and again.files == opened.files and again.source == opened.source
        assert again.metadata == opened.metadata and again.state_dict_metadata == opened.state_dict_metadata
        assert all(torch.equal(again.read(key), opened.read(key)) for key in opened)
        if kind != "safetensors":
            assert wl.load(lambda: Counts(3), again).got == ([0, 1, 2], [4])


def test_a_link_beside_it_that_leads_nowhere(tmp_path: Path) -> None:
    """Round in a circle; or, which is the same to the system call, to the folder of somebody who lets nobody look."""
    wl.save({"a": torch.ones(2)}, tmp_path)
    (tmp_path / "latest").symlink_to("latest")
    assert torch.equal(wl.open_checkpoint(tmp_path).read("a"), torch.ones(2))
    wl.save({"a": torch.zeros(2)}, tmp_path)
    assert torch.equal(wl.open_checkpoint(tmp_path).read("a"), torch.zeros(2))
