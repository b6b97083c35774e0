"""Folders of torch.distributed.checkpoint, beside torch's own reader; what is refused, and how."""

import io
import json
import os
import pickle
import random
import shutil
import time
import warnings
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_boxes import Boxed, save, split
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex

import weightlift as wl
from weightlift.checkpoint import dcp as ours
from weightlift.checkpoint import verify
from weightlift.checkpoint.torch_zip import Likeness, TorchArchive
from weightlift.cli.main import main

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64,
          torch.float8_e4m3fn, torch.int64)  # fmt: skip


def random_tensor(shape, dtype, seed):
    size = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 120, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def same(one, other):
    plain = [value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(*plain)


def refusal(path, **options):
    with pytest.raises(wl.CheckpointError) as caught:
        wl.open_checkpoint(path, **options)
    return str(caught.value)


def edited(folder, change):
    """The folder with its metadata as ``change`` leaves them, which gets torch's object."""
    path = folder / ".metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))
    return folder


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 6, bias=False))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight


def net_in_boxes(seed=0):
    torch.manual_seed(seed)
    net, rng = Net(), random.Random(seed)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    return net, {name: Boxed(value, split(tuple(value.shape), rng)) for name, value in state.items()}


@pytest.mark.parametrize("seed", range(25))
def test_any_tensors_in_any_boxes(tmp_path, seed):
    rng = random.Random(seed)
    wanted = {}
    for number in range(12):
        shape = tuple(rng.choice((0, 1, 2, 3, 5, 8)) if rng.random() < 0.1 else rng.randint(1, 6)
                      for _ in range(rng.randint(0, 4)))  # fmt: skip
        wanted[f"t{number}"] = random_tensor(shape, rng.choice(DTYPES), number)
    boxed = {name: Boxed(value, split(tuple(value.shape), rng)) for name, value in wanted.items()}
    found = wl.open_checkpoint(save(boxed, tmp_path / "saved", files=rng.choice((1, 3))))
    assert set(found) == set(wanted)
    theirs = {name: torch.zeros_like(value) for name, value in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(theirs, checkpoint_id=tmp_path / "saved", no_dist=True)
    for name, value in wanted.items():
        assert same(found.read(name), value) and same(theirs[name], value), name
        assert (found[name].shape, found[name].dtype, found[name].nbytes) == (value.shape, value.dtype, value.nbytes)
    model = nn.Module()
    for name, value in wanted.items():
        model.register_buffer(name, torch.zeros_like(value))
    for way in (lambda: wl.load(model, found), lambda: wl.load(model, found, memory_budget_bytes=1)):
        for buffer in model.buffers():
            buffer.zero_()
        way()
        for name, value in wanted.items():
            assert same(model.get_buffer(name), value), name


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"copy": True}, {"workers": 1}])
def test_a_model(tmp_path, options):
    net, boxed = net_in_boxes()
    folder = save({"model": boxed, "step": 3}, tmp_path / "saved", files=2)
    model = wl.load(Net, wl.open_checkpoint(folder, within="model"), **options)
    assert model.head.weight is model.embedding.weight
    for name, value in net.state_dict().items():
        found = model.state_dict()[name]
        expected = value.to(found.dtype)
        assert same(found, expected), name
        assert found.dtype == options.get("dtype", value.dtype) or not value.is_floating_point()


def test_the_plan_names_ranges(tmp_path):
    weight = torch.arange(12.0).view(4, 3)
    boxes = [((0, 0), (2, 3)), ((2, 0), (2, 3))]
    folder = save({"weight": Boxed(weight, boxes), "bias": torch.zeros(4)}, tmp_path / "saved")
    plan = wl.plan(lambda: nn.Linear(3, 4), folder)
    row = next(row for row in plan.decisions.rows if row.fqn == "weight")
    assert [part.entry.end - part.entry.start for part in row.parts] == [24, 24]
    raw = (folder / "__0_0.distcp").read_bytes()
    for part, rows in zip(row.parts, (weight[:2], weight[2:])):
        assert raw[part.entry.start : part.entry.end] == rows.numpy().tobytes()
    assert "2 parts: __0_0.distcp[" in str(plan)
    assert sum(len(found["parts"]) for found in json.loads(plan.to_json())["tensors"] if "parts" in found) == 2


def test_whole_tensors_lie_in_a_file(tmp_path):
    folder = save({"weight": torch.randn(4, 3), "bias": torch.zeros(4)}, tmp_path / "saved")
    entry = wl.open_checkpoint(folder)["weight"]
    assert not entry.chunks and entry.file == folder / "__0_0.distcp" and entry.end - entry.start == 48


def test_views_keep_their_strides(tmp_path):
    weight = torch.arange(12.0).view(3, 4).t()
    folder = save({"weight": weight, "bias": torch.zeros(4)}, tmp_path / "saved")
    found = wl.open_checkpoint(folder)
    assert torch.equal(found.read("weight"), weight)
    assert torch.equal(wl.load(lambda: nn.Linear(3, 4), found).weight, weight)


def test_what_else_was_saved(tmp_path):
    extra = {"scale": torch.ones(2), "n": 1}
    state = {
        "model": {"weight": torch.randn(4, 3), "bias": torch.zeros(4), "_extra_state": extra},
        "optimizer": {"state": {"weight": {"exp_avg": torch.zeros(4, 3)}}, "groups": [{"lr": 0.1, "of": ["weight"]}]},
        "step": 7,
        "arguments": io.BytesIO(b"code"),
    }
    folder = save(state, tmp_path / "saved")
    found = wl.open_checkpoint(folder, within="model")
    assert set(found) == {"weight", "bias"} and list(found.extras) == ["_extra_state"]
    assert found.extras["_extra_state"]["n"] == 1
    assert torch.equal(found.extras["_extra_state"]["scale"], torch.ones(2))
    assert "open_checkpoint(…, within='model')" in refusal(folder)
    assert "mappings under 'model', 'optimizer'" in refusal(folder, within="net")
    assert "is a tensor" in refusal(folder, within=("model", "weight"))
    assert wl.open_checkpoint(folder, within=("optimizer", "state", "weight")).read("exp_avg").shape == (4, 3)


def test_weights_beside_an_optimiser(tmp_path):
    """As some trainers save it: the model's names at the top, and everything else beside them."""
    weights = {"weight": torch.randn(4, 3), "bias": torch.zeros(4)}
    moments = {name: {"exp_avg": value, "exp_avg_sq": value} for name, value in weights.items()}
    others = {"optimizer": {"state": moments, "groups": [{"lr": 0.1}, {"lr": 0.2}]}, "loss": io.BytesIO(b"code")}
    found = wl.open_checkpoint(save({**weights, **others}, tmp_path / "saved"))
    assert set(found) == set(weights)
    assert torch.equal(found.extras["optimizer"]["state"]["weight"]["exp_avg"], weights["weight"])
    assert found.extras["optimizer"]["groups"] == [{"lr": 0.1}, {"lr": 0.2}]
    assert "BytesIO" in str(found.extras["loss"])
    model = wl.load(lambda: nn.Linear(3, 4), found, strict=False)
    assert torch.equal(model.weight, weights["weight"])
    with pytest.raises(wl.PlanError, match="optimizer") as caught:
        wl.load(lambda: nn.Linear(3, 4), found)
    drop = eval(str(caught.value.problems[0].hint).partition("key_mapping=")[2])
    assert torch.equal(wl.load(lambda: nn.Linear(3, 4), found, key_mapping=drop).weight, weights["weight"])
    assert "tensors are there already: leave within out" in refusal(tmp_path / "saved", within="model")


def test_within_too_deep(tmp_path):
    folder = save({"app": {"model": {"layers.weight": torch.ones(2)}}}, tmp_path / "saved")
    text = refusal(folder, within=("app", "model", "layers"))
    assert "tensors are there already: open_checkpoint(…, within=('app', 'model'))" in text
    assert "mappings under 'app'" in refusal(folder, within="model")


def test_an_optimiser_without_weights(tmp_path):
    """accelerate has the two in folders beside one another."""
    moments = {name: {"exp_avg": torch.ones(2)} for name in ("weight", "bias")}
    text = refusal(save({"optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]}}, tmp_path / "saved"))
    assert "mappings under 'optimizer'" in text and "weights, which are in another file or folder" in text


def test_mappings_that_a_planner_left_whole(tmp_path):
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"weight": torch.ones(2)}}, checkpoint_id=tmp_path / "a", planner=planner, no_dist=True)
        dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path / "b", planner=planner, no_dist=True)
    for within in (None, "model"):
        assert "a planner with flatten_state_dict=False" in refusal(tmp_path / "a", within=within)
    assert torch.equal(wl.open_checkpoint(tmp_path / "b").read("weight"), torch.ones(2))


def test_code_of_extra_state_is_refused(tmp_path):
    folder = save({"weight": torch.ones(2), "_extra_state": io.BytesIO(b"code")}, tmp_path / "saved")
    text = refusal(folder)
    assert "_extra_state" in text and "the pickle holds code" in text and "BytesIO" in text


def test_state_dict_hooks(tmp_path):
    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel").reshape(4, 3)
            state_dict[f"{prefix}bias"] = state_dict.pop(f"{prefix}shift")
            super()._load_from_state_dict(state_dict, prefix, *rest)

    kernel, shift = torch.randn(12), torch.randn(4)
    boxed = {"kernel": Boxed(kernel, [((0,), (5,)), ((5,), (7,))]), "shift": Boxed(shift, [((0,), (1,)), ((1,), (3,))])}
    model = wl.load(lambda: Renamed(3, 4), save(boxed, tmp_path / "saved"))
    assert torch.equal(model.weight, kernel.view(4, 3)) and torch.equal(model.bias, shift)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("alike", [True, False])
def test_ties(tmp_path, equal, alike):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
            self.two.weight = self.one.weight

    weight = torch.randn(4, 3)
    other = weight.clone() if equal else weight + 1
    rows, columns = [((0, 0), (1, 3)), ((1, 0), (3, 3))], [((0, 0), (4, 2)), ((0, 2), (4, 1))]
    boxed = {"one.weight": Boxed(weight, rows), "two.weight": Boxed(other, rows if alike else columns)}
    folder = save(boxed, tmp_path / "saved")
    if equal:
        model = wl.load(Tied, folder)
        assert model.one.weight is model.two.weight and torch.equal(model.one.weight, weight)
    else:
        with pytest.raises(wl.PlanError, match="two different values"):
            wl.load(Tied, folder)
        model = wl.load(Tied, folder, strict=False)
        assert torch.equal(model.one.weight, weight) and torch.equal(model.two.weight, other)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_buffer_that_is_a_view_of_a_weight(tmp_path, equal, seed):
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, 4))
            self.register_buffer("rows", self.weight.data[1:4])

    weight, rng = torch.randn(5, 4), random.Random(seed)
    rows = weight[1:4].clone() if equal else weight[1:4] + 1
    boxed = {"weight": Boxed(weight, [((0, 0), (2, 4)), ((2, 0), (3, 4))]), "rows": Boxed(rows, split((3, 4), rng))}
    folder = save(boxed, tmp_path / "saved")
    if equal:
        model = wl.load(Viewed, folder)
        assert torch.equal(model.weight, weight) and torch.equal(model.rows, rows)
        assert model.rows.data_ptr() == model.weight[1:].data_ptr()
    else:
        with pytest.raises(wl.PlanError, match="rows"):
            wl.load(Viewed, folder)


def test_lazy_modules_and_mismatches(tmp_path):
    weight = torch.randn(4, 3)
    boxed = {"weight": Boxed(weight, [((0, 0), (3, 3)), ((3, 0), (1, 3))]), "bias": torch.zeros(4)}
    folder = save(boxed, tmp_path / "saved")
    assert torch.equal(wl.load(lambda: nn.LazyLinear(4), folder).weight, weight)
    with pytest.raises(wl.PlanError, match=r"found \[4, 3\]"):
        wl.load(lambda: nn.Linear(5, 4), folder)


# -- safetensors of several ranks -------------------------------------------------------------------------------------


def save_by_ranks(folder, ranks):
    """As `HuggingFaceStorageWriter` does it where it does not consolidate: a file for each rank, none that lists them.
    ``ranks``: for each a mapping of keys to a box's offsets and values."""
    folder.mkdir()
    for number, boxes in enumerate(ranks, 1):
        info = {key: {"saved_offsets": list(offsets)} for key, (offsets, _) in boxes.items()}
        path = folder / f"shard-{number:05}-model-00001-of-00001.safetensors"
        tensors = {key: value.contiguous() for key, (_, value) in boxes.items()}
        save_file(tensors, path, metadata={"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info)})
    return folder


def as_torch_reads(folder, wanted):
    theirs = {name: torch.zeros_like(value) for name, value in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return theirs


@pytest.mark.parametrize("seed", range(10))
def test_safetensors_of_several_ranks(tmp_path, seed):
    rng = random.Random(seed)
    wanted, ranks = {}, [{} for _ in range(4)]
    for number in range(10):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 3)))
        value = wanted[f"t{number}"] = random_tensor(shape, rng.choice((torch.float32, torch.bfloat16)), number)
        boxes = split(shape, rng)
        while len(boxes) > len(ranks):
            boxes = split(shape, rng)
        for rank, (offsets, sizes) in zip(rng.sample(ranks, len(boxes)), boxes):
            box = value[tuple(slice(at, at + size) for at, size in zip(offsets, sizes))]
            rank[f"t{number}"] = offsets, box
    folder = save_by_ranks(tmp_path / "saved", ranks)
    found, theirs = wl.open_checkpoint(folder), as_torch_reads(folder, wanted)
    assert set(found) == set(wanted) and verify(folder) == ()
    model = nn.Module()
    for name, value in wanted.items():
        assert same(found.read(name), value) and same(theirs[name], value), name
        model.register_buffer(name, torch.zeros_like(value))
    wl.load(model, folder)
    assert all(same(model.get_buffer(name), value) for name, value in wanted.items())


def test_safetensors_of_several_ranks_that_do_not_go_together(tmp_path):
    weight = torch.arange(12.0).view(4, 3)
    good = [{"weight": ((0, 0), weight[:1])}, {"weight": ((1, 0), weight[1:])}]
    folder = save_by_ranks(tmp_path / "good", good)
    assert wl.open_checkpoint(folder)["weight"].shape == (4, 3)
    assert "the files of all ranks" in refusal(next(folder.glob("shard-00002*")))
    save_file({"weight": weight}, folder / "other.safetensors")
    assert "two shard files hold the key" in refusal(folder)
    bad = {
        "hole": [{"weight": ((0, 0), weight[:1])}, {"weight": ((2, 0), weight[2:])}],
        "overlap": [{"weight": ((0, 0), weight[:3])}, {"weight": ((2, 0), weight[2:])}],
        "dtypes": [{"weight": ((0, 0), weight[:1])}, {"weight": ((1, 0), weight[1:].double())}],
        "dims": [{"weight": ((0, 0), weight[:1])}, {"weight": ((1,), weight[1])}],
    }
    for name, ranks in bad.items():
        assert "its boxes do not make it up" in refusal(save_by_ranks(tmp_path / name, ranks)), name
    for number, info in enumerate(('{"weight": 3}', "[", "3", '{"weight": {"saved_offsets": [0, -1]}}', "[" * 100_000)):
        path = tmp_path / f"{number}.safetensors"
        save_file({"weight": weight}, path, metadata={"DCP_SHARDING_INFO": info})
        assert torch.equal(wl.open_checkpoint(path).read("weight"), weight)  # not torch's: a file like any other


# -- where it is looked for -------------------------------------------------------------------------------------------


def test_in_a_folder(tmp_path):
    folder = save({"weight": torch.ones(2)}, tmp_path / "saved")
    torch.save({"epoch": 3}, folder / "meta.pt")  # Lightning's
    for path in (folder, folder / ".metadata", str(folder)):
        assert list(wl.open_checkpoint(path)) == ["weight"]
    found = wl.open_checkpoint(folder)
    assert found.index == folder / ".metadata" and [file.format for file in found.files] == ["dcp"]
    assert "pass the folder" in refusal(folder / "__0_0.distcp")
    save_file({"other": torch.ones(1)}, folder / "model.safetensors")
    assert list(wl.open_checkpoint(folder)) == ["other"]
    (folder / "model.safetensors").unlink()
    (folder / ".metadata").unlink()
    (folder / "meta.pt").unlink()
    assert ".metadata is missing" in refusal(folder)


def test_verify_and_hashes(tmp_path):
    folder = save({"model": {"weight": torch.ones(2)}}, tmp_path / "saved")
    assert verify(folder, within="model") == ()
    assert len(verify(folder)) == 1
    assert len(verify(folder, within="model", content=True)) == 2  # no hash is known
    os.system(f"cd {folder} && sha256sum .metadata *.distcp > SHA256SUMS")
    assert verify(folder, within="model", content=True) == ()
    wl.open_checkpoint(folder, within="model", verify=True)
    raw = bytearray((folder / "__0_0.distcp").read_bytes())
    entry = wl.open_checkpoint(folder, within="model")["weight"]
    raw[entry.start] ^= 1
    (folder / "__0_0.distcp").write_bytes(raw)
    with pytest.raises(wl.CheckpointCorrupt):
        wl.open_checkpoint(folder, within="model", verify=True)


def test_the_command_line(tmp_path, capsys):
    boxed = {"model": {"weight": Boxed(torch.ones(4, 3), [((0, 0), (1, 3)), ((1, 0), (3, 3))]), "bias": torch.ones(4)}}
    folder = str(save(boxed, tmp_path / "saved"))
    assert main(["inspect", folder, "--within", "model", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [len(item.get("chunks", ())) for item in told["tensors"]] == [2, 0]
    assert [(item["format"], item["tensors"], item["bytes"]) for item in told["files"]] == [("dcp", 3, 64)]
    assert main(["inspect", folder, "--within", "model"]) == 0
    assert "__0_0.distcp" in capsys.readouterr().out
    assert main(["inspect", folder]) == 1
    assert "--within model" in capsys.readouterr().err


def test_changed_meanwhile(tmp_path):
    state = {"weight": Boxed(torch.ones(4, 3), [((0, 0), (1, 3)), ((1, 0), (3, 3))]), "bias": torch.ones(4)}
    found = wl.open_checkpoint(save(state, tmp_path / "saved"))
    path = tmp_path / "saved" / "__0_0.distcp"
    path.write_bytes(path.read_bytes())
    for act in (lambda: found.read("weight"), lambda: wl.load(lambda: nn.Linear(3, 4), found)):
        with pytest.raises(wl.CheckpointChanged):
            act()


# -- what is refused --------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/weightlift-was-here",)


def _chunks(metadata):
    return metadata.state_dict_metadata["weight"].chunks


def _place(metadata, **changes):
    for key, value in list(metadata.storage_data.items()):
        metadata.storage_data[key] = type(value)(**{**vars(value), **changes})


def _rekey(metadata, path):
    metadata.planner_data["weight"] = path


def _nest(kind):
    """Two of what holds two of what …: printed it would fill every memory."""
    made = kind((1,))
    for _ in range(60):
        made = kind((made, made))
    return made


EDITS = {
    "outside": (lambda m: _place(m, relative_path="../x.distcp"), "leads out of the folder"),
    "absolute": (lambda m: _place(m, relative_path="/etc/passwd"), "absolute path"),
    "no such file": (lambda m: _place(m, relative_path="__9_0.distcp"), "names a missing file"),
    "beyond": (lambda m: _place(m, length=1 << 40), "lies beyond the end of the file"),
    "negative": (lambda m: _place(m, offset=-1), "is no range of a file"),
    "elsewhere": (lambda m: _place(m, offset=7), "the zip is damaged"),
    "cut": (lambda m: _place(m, length=100), "the zip is damaged"),
    "nothing": (lambda m: _place(m, length=0), "the zip is damaged"),
    "packed": (lambda m: _place(m, transform_descriptors=("zstd",)), "written with the extension zstd"),
    "packed by a number": (lambda m: _place(m, transform_descriptors=5), "with the extension of no name"),
    "packed by a long number": (lambda m: _place(m, transform_descriptors=[10**5000]), "the extension of no name"),
    "packed by a nest": (lambda m: _place(m, transform_descriptors=_nest(list)), "with the extension of no name"),
    "a hole": (lambda m: _chunks(m).pop(), "its boxes do not make it up"),
    "another shape": (lambda m: setattr(m.state_dict_metadata["weight"], "size", torch.Size([9, 9])), "do not make it"),
    "another box": (lambda m: setattr(_chunks(m)[0], "sizes", torch.Size([4, 3])), "is not what its metadata says"),
    "a box outside": (lambda m: setattr(_chunks(m)[0], "offsets", torch.Size([5, 5])), "no file holds it at"),
    "other dtype": (
        lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", torch.int32), "is not what its metadata",
    ),
    "no dtype": (lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", 3), "whose dtype is int"),
    "no place": (lambda m: m.storage_data.clear(), "no file holds it"),
    "no metadata": (lambda m: [1, 2], "is no Metadata"),
    "a step of its own": (lambda m: _rekey(m, ((),)), "is no place"),
    "a nested step": (lambda m: _rekey(m, (_nest(tuple), "a")), "is no place"),
    "a long number": (lambda m: _rekey(m, ("a", 10**5000)), "is no place"),
    "very deep": (lambda m: _rekey(m, ("a",) * 1000), "is no place"),
    "within another": (lambda m: _rekey(m, ("bias", "x")), "is no place"),
    "twice": (lambda m: _rekey(m, ("bias",)), "is no place"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    state = {"bias": torch.ones(4), "weight": Boxed(torch.ones(4, 3), [((0, 0), (1, 3)), ((1, 0), (3, 3))])}
    return save(state, tmp_path / "saved")


@pytest.mark.parametrize("name", EDITS)
def test_bad_metadata(folder, name):
    change, told = EDITS[name]
    result = change
    assert told in refusal(edited(folder, lambda m: found if isinstance(found := result(m), list) and
                                  name == "no metadata" else None))  # fmt: skip


def test_overlaps(folder):
    def shift(metadata):
        first = _chunks(metadata)[0]
        first.sizes, first.offsets = torch.Size([3, 3]), torch.Size([0, 0])
        stored = metadata.storage_data
        stored[MetadataIndex("weight", [0, 0])] = stored[MetadataIndex("weight", [1, 0])]
        metadata.state_dict_metadata["weight"].size = torch.Size([6, 3])

    assert "lies where another value does" in refusal(edited(folder, shift))


def _same_chunks(metadata):
    weight = metadata.state_dict_metadata["weight"]
    weight.chunks = [ChunkStorageMetadata(torch.Size((i, 0)), torch.Size((1, 3))) for i in range(4000)]
    metadata.state_dict_metadata.update({f"k{i}": weight for i in range(4000)})


def _same_sizes(metadata):
    long = [1] * 100_000
    metadata.state_dict_metadata["weight"].chunks = [ChunkStorageMetadata(long, long) for _ in range(4000)]


def _same_path(metadata):
    long = ("a",) * 100_000
    for i in range(4000):
        metadata.state_dict_metadata[f"k{i}"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(f"k{i}")] = next(iter(metadata.storage_data.values()))
        metadata.planner_data[f"k{i}"] = long


def _same_archive(metadata):
    place = next(iter(metadata.storage_data.values()))
    for i in range(20_000):
        metadata.state_dict_metadata[f"k{i}._extra_state"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(f"k{i}._extra_state")] = place


@pytest.mark.parametrize("change", [_same_chunks, _same_sizes, _same_path, _same_archive])
def test_what_many_share_is_refused_in_linear_time(folder, change):
    edited(folder, change)
    start = time.process_time()
    refusal(folder)
    assert time.process_time() - start < 8


def test_code_in_metadata_is_passed_over(folder):
    def add(metadata):
        metadata.storage_meta = Evil()
        metadata.planner_data["more"] = (Evil(),)

    edited(folder, add)
    assert set(wl.open_checkpoint(folder)) == {"bias", "weight"}
    assert not os.path.exists("/tmp/weightlift-was-here")


def test_cut_and_empty_files(folder):
    path = folder / "__0_0.distcp"
    raw = path.read_bytes()
    path.write_bytes(raw[:-10])
    assert "lies beyond the end of the file" in refusal(folder)
    path.write_bytes(b"")
    assert refusal(folder).count("lies beyond") == 3
    path.unlink()
    assert "missing file" in refusal(folder / ".metadata")
    (folder / ".metadata").write_bytes(b"")
    assert "is damaged" in refusal(folder / ".metadata")


def test_damage_is_told_with_key_and_place(folder):
    path = folder / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    entry = wl.open_checkpoint(folder)["bias"]
    at = raw.index(b"PK\1\2", entry.end)  # the first entry of that archive's directory
    raw[at + 10] = 8  # compressed
    path.write_bytes(raw)
    with pytest.raises(wl.CheckpointError) as caught:
        wl.open_checkpoint(folder)
    (problem,) = caught.value.problems
    assert problem.key == "bias" and problem.file == path and "compressed" in problem.what


def test_what_is_taken_to_be_alike(tmp_path, monkeypatch):
    """One byte of the second of two boxes is another: what is found is what a look at each of them finds."""
    weight = torch.arange(8.0).view(2, 4)
    folder = save({"weight": Boxed(weight, [((0, 0), (1, 4)), ((1, 0), (1, 4))])}, tmp_path / "saved")
    path = folder / "__0_0.distcp"
    raw = path.read_bytes()
    first, second = (chunk.entry for chunk in wl.open_checkpoint(folder)["weight"].chunks)
    looks = []
    monkeypatch.setattr(ours, "TorchArchive", lambda *args, **more: looks.append(1) or TorchArchive(*args, **more))
    wl.open_checkpoint(folder)
    assert len(looks) == 1 and second.start - first.start == len(raw) // 2

    def found():
        try:
            return dict(wl.open_checkpoint(folder))
        except wl.CheckpointError as error:
            return str(error)

    rng = random.Random(0)
    refused = 0
    for at in rng.sample([at for at in range(len(raw) // 2, len(raw)) if not second.start <= at < second.end], 250):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
        here = found()
        with monkeypatch.context() as patch:
            patch.setattr(Likeness, "of", lambda *_: None)
            assert here == found(), at
        refused += isinstance(here, str)
    assert refused > 50


def test_other_archives(folder, tmp_path):
    """A piece that is packed again by another tool, and one that is no archive."""
    path = folder / "__0_0.distcp"
    whole = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    for raw in ((tmp_path / "x.zip").read_bytes(), b"\x80\x02N." * 100):
        path.write_bytes(raw + whole)
        edited(folder, lambda m, raw=raw: [_place(m, offset=0, length=len(raw)), None][1])
        refusal(folder)


def test_tiles():
    assert ours.tiles((), [((), ())])
    assert not ours.tiles((), [])
    assert not ours.tiles((2,), [((0,), (1,)), ((0,), (1,))])
    assert not ours.tiles((4, 4), [((0, 0), (2, 4)), ((1, 0), (2, 4))])
    assert not ours.tiles((4,), [((2,), (4,))])
    assert not ours.tiles((1,) * 20, [((0,) * 19, (1,) * 19)])
    assert not ours.tiles((1 << 40, 1 << 40), [((0, 0), (1 << 40, 1 << 40))])
    many = [((i, *(i >> j & 1 for j in range(11))), (1,) * 12) for i in range(4096)]
    assert not ours.tiles((2, *(2,) * 11), many)  # 2**24 corners, which would fill the memory
    rng = random.Random(0)
    for _ in range(300):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 3)))
        boxes = split(shape, rng)
        assert ours.tiles(shape, boxes)
        moved = [list(box) for box in boxes]
        at, dim = rng.randrange(len(moved)), rng.randrange(len(shape))
        part = rng.randrange(2)
        changed = list(moved[at][part])
        changed[dim] = max(0, changed[dim] + rng.choice((-1, 1)))
        moved[at][part] = tuple(changed)
        seen = torch.zeros(tuple(2 * size + 2 for size in shape), dtype=torch.int)
        for offsets, sizes in moved:
            view = seen
            for axis, (offset, size) in enumerate(zip(offsets, sizes)):
                view = view.narrow(axis, offset, size)
            view += 1
        inside = seen[tuple(slice(0, size) for size in shape)]
        right = bool((inside == 1).all()) and int(seen.sum()) == inside.numel()
        filled = [tuple(box) for box in moved if 0 not in box[1]]
        assert ours.tiles(shape, filled) == right


def test_a_copy_without_hidden_files(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "__0_0.distcp", other)
    assert "hidden files were not copied" in refusal(other)


def test_metadata_of_each_rank(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True, use_collectives=False)
    assert "use_collectives=False" in refusal(tmp_path)
