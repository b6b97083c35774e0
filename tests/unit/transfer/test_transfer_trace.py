"""Traces: every byte of a load shows in a span, failed loads leave one too, and without a trace nothing is recorded."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightlift as wl
from weightlift.transfer import trace as trace_module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(600, 600)
        self.narrow = nn.Linear(600, 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def _events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == kind]


def _bytes(events: list[dict[str, Any]]) -> int:
    return sum(event["args"]["bytes"] for event in events)


@pytest.mark.parametrize("workers", [1, 4])
def test_every_byte_is_read_and_converted_in_a_span(folder: Path, workers: int) -> None:
    path = folder / "trace.json"
    wl.load(Net, folder, dtype=torch.bfloat16, trace=path, workers=workers)
    nbytes = sum(value.nbytes for value in Net().state_dict().values())
    assert _bytes(_events(path, "read")) == nbytes
    assert _bytes(_events(path, "convert")) == nbytes
    for kind in ("open", "construct", "plan", "check", "assign"):
        assert len(_events(path, kind)) == 1, kind
    assert all(event["dur"] >= 0 for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X")


def test_mapping_and_initialisers_show(folder: Path) -> None:
    state = Net().state_dict()
    del state["narrow.weight"]
    save_file(state, folder / "model.safetensors")
    path = folder / "trace.json"
    wl.load(Net, folder, strict=False, trace=path)
    assert _bytes(_events(path, "map")) == sum(value.nbytes for value in state.values())
    assert [event["name"] for event in _events(path, "init")] == ["narrow.weight"]
    assert _bytes(_events(path, "init")) == 600 * 7 * 4


def test_memory_is_sampled(folder: Path) -> None:
    path = folder / "trace.json"
    wl.load(Net, folder, copy=True, trace=path)
    samples = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "C"]
    assert len(samples) >= 2
    assert all(sample["args"]["own"] > 0 for sample in samples)


def test_a_load_that_fails_leaves_its_trace(folder: Path) -> None:
    path = folder / "trace.json"
    plan = wl.plan(Net, folder, copy=True, trace=path)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(wl.WeightliftError):
        plan.execute()
    assert _events(path, "plan")


def test_without_a_trace_nothing_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a trace was made")

    monkeypatch.setattr(trace_module.Trace, "__init__", refuse)
    wl.load(Net, folder, copy=True, dtype=torch.float16)
    with pytest.raises(AssertionError, match="a trace was made"):
        wl.load(Net, folder, trace=folder / "trace.json")


def test_hashing_is_no_initialiser(folder: Path) -> None:
    wl.save(Net(), folder, manifest=True)
    path = folder / "trace.json"
    wl.load(Net, folder, verify=True, trace=path)
    assert len(_events(path, "hash")) == 1
    assert _events(path, "init") == []


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("none/trace.html", FileNotFoundError, "there is no folder"),
        ("", IsADirectoryError, "found the folder"),
        ("model.safetensors/trace.html", FileNotFoundError, "there is no folder"),
    ],
)
def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_read(
    folder: Path, name: str, error: type[OSError], said: str
) -> None:
    def build() -> nn.Module:
        raise AssertionError("it was built")

    for call in (wl.load, wl.plan):
        with pytest.raises(error, match=said):
            call(build, folder, trace=folder / name)
    with pytest.raises(error, match=said):
        wl.defer(Net).load(folder, trace=folder / name)


def test_a_trace_without_permission_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "old.json").write_text("")
    monkeypatch.setattr("os.access", lambda *_: False)
    for name, said in (("old.json", "the file .*may not be written to"), ("new.json", "nothing may be written to")):
        with pytest.raises(PermissionError, match=said):
            wl.load(Net, folder, trace=folder / name)


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")


@FULL
def test_a_trace_that_fails_in_the_end_costs_no_module(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = wl.load(Net, folder, trace="/dev/full")
    assert torch.equal(loaded.wide.weight, wl.load(Net, folder).wide.weight)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.name == "weightlift" and "No space left" in record.getMessage() and "trace" in record.getMessage()


def test_a_trace_that_fails_half_way_leaves_no_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:100])
        raise OSError("No space left on device")

    (folder / "old.html").touch()
    monkeypatch.setattr(Path, "write_text", full)
    for name in ("new.html", "old.html"):
        wl.load(Net, folder / "model.safetensors", trace=folder / name)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "old.html"]


@FULL
def test_a_trace_that_fails_hides_no_error(folder: Path) -> None:
    plan = wl.plan(Net, folder, copy=True, trace="/dev/full")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(wl.WeightliftError):
        plan.execute()


@pytest.mark.parametrize("name", ["{{DATA}}", "{{TITLE}}", "</title><script>", 'q"\\', "\udcff"])
@pytest.mark.parametrize("suffix", ["html", "json"])
def test_a_folder_of_an_odd_name(tmp_path: Path, name: str, suffix: str) -> None:
    """The module is not lost for it, and the page's script holds JSON."""
    folder = tmp_path.joinpath(*name.split("/"))
    try:
        folder.mkdir(parents=True)
    except (OSError, UnicodeEncodeError):
        pytest.skip("the system has no such names")
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    path = tmp_path / f"trace.{suffix}"
    wl.load(Net, folder, trace=path)
    text = path.read_text("utf-8")
    if suffix == "json":
        assert json.loads(text)["traceEvents"]
        return
    head, _, rest = text.partition("<title>")
    title = html.unescape(rest.partition("</title>")[0])
    assert title == f"{folder} into Net".encode(errors="backslashreplace").decode() and "<script" not in head
    (data,) = [line for line in text.split("\n") if line.startswith("const DATA = ")]
    assert json.loads(data.removeprefix("const DATA = ").removesuffix(";"))["title"] == f"{folder} into Net"
