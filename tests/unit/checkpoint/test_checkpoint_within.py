"""A state dict in the midst of what a trainer saved: arguments, an optimiser, callbacks, any code."""

import argparse
import collections
import enum
import os
import pathlib
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import weightlift as wl
from weightlift.checkpoint import verify
from weightlift.cli.main import main


class Callback:
    def __init__(self):
        self.best = [1.0]
        self.kept = {"weight": torch.ones(2)}


class OfRanks:
    """What pickles as a DTensor, or anything else that holds one rank's part, without several ranks."""

    def __reduce__(self):
        return torch._tensor._rebuild_from_type_v2, (torch.Size, DTensor, (), {})


class Stage(enum.Enum):
    FIT = 1


class Names(dict):
    pass


class Losses(list):
    pass


class Named(tuple):
    def __new__(cls, *, first):
        return super().__new__(cls, (first,))

    def __getnewargs_ex__(self):
        return (), {"first": self[0]}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/weightlift-was-within",)


def beside():
    """All that trainers save, and more: by name, one thing of a kind."""
    losses = []
    losses.append((losses,))
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    return {
        "hyper_parameters": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
        "optimizer": optimizer.state_dict(),
        "optimizer_itself": optimizer,
        "lr_schedulers": [torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict()],
        "callbacks": {Callback: Callback(), "best": Callback()},
        "loops": {Stage.FIT: 3, "stage": Stage.FIT, (Stage.FIT, 1): 2},
        "numpy": (np.float64(3), np.arange(4), np.random.RandomState(0).get_state(), np.dtype("int64")),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "names": Names(a=1),
        "losses": Losses([1, 2]),
        "itself": losses,
        "frozen": frozenset({Stage.FIT, 1}),
        "stages": {Stage.FIT, "fit"},
        "by_name": Named(first=1),
        "module": nn.Linear(2, 2),
        "function": torch.relu,
        "slice": slice(1, 2),
        "deque": collections.deque([1, 2]),
        "largest": torch.return_types.max((torch.ones(1), torch.ones(1))),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "evil": Evil(),
    }


def saved(path, value, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, **how)
    return path


WAYS = [
    *({"pickle_protocol": protocol} for protocol in (2, 3, 4, 5)),
    *({"pickle_protocol": protocol, "_use_new_zipfile_serialization": False} for protocol in (2, 4, 5)),
]


@pytest.mark.parametrize("how", WAYS)
def test_the_state_dict_is_read_whatever_lies_beside_it(tmp_path, how):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = saved(tmp_path / "last.ckpt", {"epoch": 3, **beside(), "state_dict": module.state_dict()}, **how)
    found = wl.open_checkpoint(path, within="state_dict")
    assert list(found) == list(module.state_dict())
    assert dict(found.state_dict_metadata["1"]) == {"version": 2}
    loaded = wl.load(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), found)
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert not verify(path, within="state_dict")
    assert not os.path.exists("/tmp/weightlift-was-within")


@pytest.mark.parametrize("name", beside())
@pytest.mark.parametrize("zipped", [True, False])
def test_one_thing_beside_it(tmp_path, name, zipped):
    value = {"model": {"w": torch.arange(3.0)}, name: beside()[name]}
    path = saved(tmp_path / "x.pt", value, _use_new_zipfile_serialization=zipped)
    assert torch.equal(wl.open_checkpoint(path, within="model").read("w"), torch.arange(3.0))


def test_nothing_that_is_named_is_imported(tmp_path, monkeypatch):
    (tmp_path / "made_up_trainer.py").write_text("class Arguments:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = __import__("made_up_trainer").Arguments()
    path = saved(tmp_path / "x.pt", {"model": {"w": torch.ones(1)}, "arguments": arguments})
    del sys.modules["made_up_trainer"]
    assert list(wl.open_checkpoint(path, within="model")) == ["w"]
    with pytest.raises(wl.CheckpointError, match=r"found made_up_trainer\.Arguments"):
        wl.open_checkpoint(path)
    assert "made_up_trainer" not in sys.modules


def test_deeper_and_in_memory():
    given = {"a": {"ema": nn.Linear(2, 2).state_dict(), "epoch": 1}}
    found = wl.open_checkpoint(given, within=("a", "ema"))
    assert list(found) == ["weight", "bias"]
    assert dict(found.state_dict_metadata[""]) == {"version": 1}
    loaded = wl.load(lambda: nn.Linear(2, 2), found)
    assert loaded.bias.data_ptr() == given["a"]["ema"]["bias"].data_ptr()
    with pytest.raises(wl.CheckpointError, match=r"holds no such mapping; .*mappings under 'ema'"):
        wl.open_checkpoint(given, within=["a", "model"])


def test_names_with_a_dot_between_them_are_told_apart():
    given = {"a": {"ema": {"inner": nn.Linear(2, 2).state_dict()}}}
    for within in ("a.ema.inner", ["a", "ema.inner"], ("a.ema", "inner")):
        hint = said(given, within=within).partition("are a tuple: ")[2].replace("…", "given")
        assert list(eval(hint, {"open_checkpoint": wl.open_checkpoint, "given": given})) == ["weight", "bias"]
    assert "tuple" not in said(given, within="a.model")


def said(source, **options):
    with pytest.raises(wl.CheckpointError) as caught:
        wl.open_checkpoint(source, **options)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_errors_say_where_it_lies(tmp_path, zipped):
    value = {"epoch": 1, "args": argparse.Namespace(), "model": {"w": torch.ones(1), "f": Stage.FIT}, "ema": {}}
    path = saved(tmp_path / "x.pt", value, _use_new_zipfile_serialization=zipped)
    text = said(path)
    assert "holds code" in text and "found argparse.Namespace" in text
    assert "the weights are inside: open_checkpoint(…, within='model') reads them alone" in text
    text = said(path, within="modle")
    assert "open_checkpoint(…, within='modle'); found mappings under 'model', 'ema'" in text
    assert "found given['model']['w'] is a tensor" in said(path, within=("model", "w"))
    assert "found no mapping within it" in said(path, within=("model", "x"))
    assert "found given['args'] is an object of argparse.Namespace" in said(path, within="args")
    assert "an empty mapping" in said(path, within="ema")
    text = said(path, within="model")
    assert "f: is an object of " in text and "Stage, which weightlift cannot read" in text
    text = said(saved(tmp_path / "y.pt", {"x": {"y": {"w": torch.ones(1)}}}), within="x")
    assert "the state dict is nested" in text and "within=('x', 'y')" in text
    assert "found given is an object of torch.nn.modules.linear.Linear" in said(
        saved(tmp_path / "m.pt", nn.Linear(2, 2)), within="x"
    )
    assert "found given is a list" in said(saved(tmp_path / "z.pt", [1]), within="x")


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"n": 1}

    def set_extra_state(self, state):
        self.got = state


@pytest.mark.parametrize("key", [Stage.FIT, Callback, torch.float32, (1, Stage.FIT)])
def test_nothing_of_the_state_dict_itself_is_passed_over(tmp_path, key):
    state = Extra(2, 2).state_dict()
    state["_extra_state"] = {key: "scale", "n": 1}
    path = saved(tmp_path / "x.pt", {"model": state, "args": argparse.Namespace()})
    assert "_extra_state: holds what only code could make" in said(path, within="model")
    path = saved(tmp_path / "y.pt", {"model": {"w": torch.ones(1), key: torch.ones(1)}, "args": 1})
    assert "holds what only code could make" in said(path, within="model")


def pickled(path, body):
    """A file of torch.save with this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + body)
        archive.writestr("a/version", "3\n")
    return path


WEIGHTS = b"X\x05\x00\x00\x00model}X\x04\x00\x00\x00stepK\x01s"
OLD = {
    "bytes of Python 2": b"U\x04\xff\xfe\x00\x01",
    "an old class": b"(coptparse\nValues\nK\x01o",
    "an old class by name": b"(K\x01ioptparse\nValues\n",
    "an extension": b"\x82\x01",
    "a storage of another device": b"(X\x07\x00\x00\x00storagectorch.npu\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00npuK\x02tQ",
    "kept elsewhere": b"X\x03\x00\x00\x00othQ",
    "too large a number": b"c__builtin__\ncomplex\nK\x01\x8a\x82" + b"\x7f" * 130 + b"\x86R",
}


@pytest.mark.parametrize("name", OLD)
def test_pickles_of_other_days_and_devices(tmp_path, name):
    path = pickled(tmp_path / "x.pt", b"}(X\x01\x00\x00\x00o" + OLD[name] + WEIGHTS + b"u.")
    assert "found 1 values, none of them a tensor" in said(path, within="model")


DEEP = 200_000
HOSTILE = {
    "a counter of tuples": b"ccollections\nCounter\n]K\x01" + b"\x85" * DEEP + b"K\x01\x86a\x85R",
    "a layout of tuples": b"ctorch.serialization\n_get_layout\nK\x01" + b"\x85" * DEEP + b"\x85R",
    "a layout of doubled tuples": b"ctorch.serialization\n_get_layout\nK\x01" + b"2\x86" * 60 + b"\x85R",
    "a number of many digits": b"\x8b\x10\x27\x00\x00" + b"\x7f" * 10_000,
}  # fmt: skip


@pytest.mark.parametrize("within", [None, "model"])
@pytest.mark.parametrize("is_key", [False, True])
@pytest.mark.parametrize("code", [b"", b"X\x01\x00\x00\x00ccos\nsystem\n"])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_checkpoint_holds_is_refused(tmp_path, name, code, is_key, within):
    item = HOSTILE[name] + b"K\x01" if is_key else b"X\x01\x00\x00\x00l" + HOSTILE[name]
    path = pickled(tmp_path / "x.pt", b"}(" + code + item + WEIGHTS + b"u.")
    said(path, within=within)


@pytest.mark.parametrize("ascending", [True, False])
def test_mappings_that_hold_one_another_are_looked_at_once(tmp_path, ascending):
    chain = [{"w": torch.ones(1)}]
    for _ in range(3000):
        chain.append({"n": chain[-1]})
    order = chain if ascending else chain[::-1]
    root = {f"k{place}": mapping for place, mapping in enumerate(order)}
    saved(tmp_path / "x.pt", {"first": chain, **root, "args": argparse.Namespace()})
    said(tmp_path / "x.pt")  # hours, if each were looked through for each


def test_a_terminal_is_told_nothing_by_names(tmp_path, capsys):
    value = {"q": {"\x1b[31mX\x07": nn.Linear(2, 2).state_dict()}, "args": argparse.Namespace()}
    path = saved(tmp_path / "x.pt", value)
    assert main(["inspect", str(path)]) == 1
    told = capsys.readouterr()
    assert "the weights are inside" in told.err
    assert "\x1b" not in told.err + told.out


def test_what_has_no_parts(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    assert "holds tensors and no mappings; expected a file of torch.save" in said(
        tmp_path / "x.safetensors", within="state_dict"
    )
    opened = wl.open_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(TypeError, match="within: expected no Checkpoint"):
        wl.open_checkpoint(opened, within="state_dict")
    for within in (3, [3], {"model"}):
        with pytest.raises(TypeError, match="within: expected"):
            wl.open_checkpoint({"w": torch.ones(1)}, within=within)


def test_shards_of_an_index_each_have_it(tmp_path):
    for number in (1, 2):
        saved(tmp_path / f"{number}.bin", {"model": {f"w{number}": torch.ones(number)}, "args": argparse.Namespace()})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"w1": "1.bin", "w2": "2.bin"}}')
    assert sorted(wl.open_checkpoint(tmp_path, within="model")) == ["w1", "w2"]


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    value = {"a": {"b": nn.Linear(2, 2).state_dict()}, "args": argparse.Namespace()}
    path = str(saved(tmp_path / "x.pt", value))
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["inspect", path]) == 1
    assert "--within a --within b reads them alone" in capsys.readouterr().err
    within = ["--within", "a", "--within", "b"]
    assert main(["inspect", path, *within]) == 0
    assert "weight" in capsys.readouterr().out
    assert main(["verify", path, *within]) == 0
    assert "valid: 2 tensors" in capsys.readouterr().out
    assert main(["verify", path]) == 1
    assert "--within a --within b" in capsys.readouterr().out
    (tmp_path / "made_within.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in ("plan", "load"):
        assert main([command, path, "--model", "made_within:build", *within]) == 0
        assert "2 loaded" in capsys.readouterr().out


def test_tensors_of_several_ranks(tmp_path):
    """What ``torch.save(model.state_dict())`` leaves under FSDP2."""
    remedy = "gathers with StateDictOptions(full_state_dict=True)"
    torch.save({"weight": OfRanks(), "bias": torch.ones(2)}, tmp_path / "flat.pt")
    torch.save({"model": {"weight": OfRanks(), "bias": torch.ones(2)}, "epoch": 3}, tmp_path / "nested.pt")
    for name, within in (("flat", None), ("nested", None), ("nested", "model")):
        with pytest.raises(wl.CheckpointError) as caught:
            wl.open_checkpoint(tmp_path / f"{name}.pt", within=within)
        assert [remedy in str(problem.hint) for problem in caught.value.problems] == [True], name
    assert caught.value.problems[0].key == "weight"


def test_what_a_trainer_keeps_beside_weights(tmp_path):
    for name in ("optimizer_states", "callbacks"):
        torch.save({name: {"best": {"score": torch.ones(1)}}, "epoch": 3}, tmp_path / "meta.pt")
        with pytest.raises(wl.CheckpointError, match="weights, which are in another file or folder"):
            wl.open_checkpoint(tmp_path / "meta.pt")


def test_the_command_line_says_to_leave_within_out(tmp_path, capsys):
    torch.save({"weight": torch.ones(2), "optimizer": {"lr": 0.1}}, tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt"), "--within", "model"]) == 1
    assert "tensors are there already: leave --within out" in capsys.readouterr().err
