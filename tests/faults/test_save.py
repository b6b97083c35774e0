"""`weightlift.save`: what it writes, what it refuses, and that no failure leaves a mixture of old and new."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import weightlift as wl
from weightlift.checkpoint import verify
from weightlift.checkpoint.write import write_safetensors


class Net(nn.Module):
    """Tied, with a buffer, a scalar, something empty and something transposed."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 32, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.randn(width, 4).t())
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("count", torch.tensor(7))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("limit", [5_000_000_000, 1500])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, limit: int) -> None:
    model = Net()
    paths = wl.save(model, tmp_path, max_shard_bytes=limit, metadata={"step": "5"})
    assert same(wl.load(Net, tmp_path), model)
    assert verify(tmp_path) == ()
    held = [key for path in paths for key in safetensors.torch.load_file(path)]
    assert sorted(held) == sorted(key for key in model.state_dict() if key != "head.weight")
    for path in paths:
        with safetensors.safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "step": "5", "head.weight": "embed.weight"}
    assert (len(paths) > 1) == (limit == 1500)
    index = tmp_path / "model.safetensors.index.json"
    if len(paths) == 1:
        assert sorted(os.listdir(tmp_path)) == ["model.safetensors"]
        assert not safetensors.torch.load_model(Net(), paths[0])[1]  # the metadata is what the official tools expect
    else:
        assert sorted(json.loads(index.read_text())["weight_map"]) == sorted(held)


@pytest.mark.parametrize("metadata", [{}, {"note": "x" * 7}, {"note": "ü" * 40}])
def test_tensors_lie_as_those_of_torch_do(tmp_path: Path, metadata: dict[str, str]) -> None:
    state = {
        "a": torch.ones(3),
        "bias": torch.ones(16),
        "half": torch.ones(3, 32, dtype=torch.bfloat16),
        "odd": torch.ones(5, dtype=torch.uint8),
        "weight": torch.ones(16, 3, dtype=torch.float64),
    }
    (file,) = wl.save(state, tmp_path, metadata=metadata)
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    assert begin % 64 == 0
    header = json.loads(content[8:begin])
    starts = {key: begin + header[key]["data_offsets"][0] for key in state}
    assert all(starts[key] % 64 == 0 for key in ("bias", "half", "weight"))
    assert all(start % state[key].element_size() == 0 for key, start in starts.items())
    loaded = safetensors.torch.load_file(file)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_every_dtype_of_the_format(tmp_path: Path) -> None:
    from weightlift import dtypes

    state = {}
    for name, dtype in dtypes.TORCH.items():
        state[name] = torch.arange(48, dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.ones(4).bool()
    path = wl.save(state, tmp_path)[0]
    opened = wl.open_checkpoint(path)
    for name, value in state.items():
        assert opened[name].dtype == value.dtype
        assert bytes(opened.read(name).untyped_storage()) == bytes(value.untyped_storage())
        assert opened[name].start % value.element_size() == 0
    assert set(safetensors.torch.load_file(path)) == set(state)


@pytest.mark.parametrize("limit", [5_000_000_000, 1500])
def test_over_the_files_that_the_model_is_mapped_from(tmp_path: Path, limit: int) -> None:
    first = Net()
    wl.save(first, tmp_path, max_shard_bytes=limit)
    mapped = wl.load(Net, tmp_path)
    other = wl.load(Net, tmp_path)
    with torch.no_grad():
        mapped.layers[1].weight += 1
    for _ in range(3):
        wl.save(mapped, tmp_path, max_shard_bytes=limit)
    again = wl.load(Net, tmp_path)
    assert same(again, mapped)
    assert torch.equal(again.layers[1].weight, first.layers[1].weight + 1)
    assert same(other, first)  # its pages are those of the file that is gone


@pytest.mark.parametrize("before", [5_000_000_000, 1500, 4000])
@pytest.mark.parametrize("after", [5_000_000_000, 1500, 4000])
def test_one_layout_replaces_another(tmp_path: Path, before: int, after: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    wl.save(Net(), tmp_path, max_shard_bytes=before, manifest=True)
    second = Net()
    paths = wl.save(second, tmp_path, max_shard_bytes=after)
    left = {"config.json", *(path.name for path in paths)} | (
        {"model.safetensors.index.json"} if len(paths) > 1 else set()
    )
    assert set(os.listdir(tmp_path)) == left
    assert same(wl.load(Net, tmp_path), second)


def test_the_manifest_keeps_the_lines_of_others(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n{'1' * 64} *model.safetensors\n")
    wl.save(Net(), tmp_path, manifest=True)
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 2 and lines[0] == f"{'0' * 64}  config.json" and lines[1].endswith("  model.safetensors")
    wl.save(Net(), tmp_path)
    assert (tmp_path / "SHA256SUMS").read_text() == f"{'0' * 64}  config.json\n"


def test_the_manifest_drops_lines_of_files_that_were_not_there(tmp_path: Path) -> None:
    """Of a checkpoint that was moved away: its hashes are not those of the new files."""
    for limit, files in ((5_000_000_000, ["model.safetensors"]), (1500, None)):
        folder = tmp_path / str(limit)
        paths = wl.save(Net(), folder, max_shard_bytes=limit, manifest=True)
        for file in files or [*(path.name for path in paths), "model.safetensors.index.json"]:
            os.rename(folder / file, folder / f"{file}.old")
        wl.save(Net(), folder, max_shard_bytes=limit)
        assert not (folder / "SHA256SUMS").exists()
        with pytest.raises(wl.CheckpointError, match="no hash is written down"):
            wl.load(Net, folder, verify=True)
        wl.save(Net(), folder, max_shard_bytes=limit, manifest=True)
        wl.load(Net, folder, verify=True)


def test_the_manifest_keeps_odd_names_of_others(tmp_path: Path) -> None:
    text = f"\\{'0' * 64}  odd\\nname\\\\\n".encode() + f"{'1' * 64}  ".encode() + b"caf\xe9\n"
    (tmp_path / "SHA256SUMS").write_bytes(text)
    wl.save(Net(), tmp_path, manifest=True)
    kept = (tmp_path / "SHA256SUMS").read_bytes().splitlines(keepends=True)
    assert sorted(kept) == sorted([*text.splitlines(keepends=True), next(line for line in kept if b"model" in line)])


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("512 MiB", 2**29), ("1.5kb", 1500), ("700B", 700), (" 2TiB ", 2**41), (1500, 1500)],
)
def test_sizes_of_files(text: str | int, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    saving = sys.modules["weightlift.checkpoint.save"]
    real = saving._split
    monkeypatch.setattr(saving, "_split", lambda *given: seen.append(given[2]) or real(*given))
    wl.save(Net(), tmp_path, max_shard_bytes=text)
    assert seen == [size]


@pytest.mark.parametrize(
    ("size", "error"),
    [("5 gigabytes", ValueError), ("GB", ValueError), ("5", ValueError), ("5iB", ValueError), ("0GB", ValueError),
     (0, ValueError), (-1, ValueError), (5e9, TypeError), (None, TypeError), (True, TypeError)],
)  # fmt: skip
def test_sizes_that_are_none(size: Any, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match="max_shard_bytes must be"):
        wl.save(Net(), tmp_path, max_shard_bytes=size)


@pytest.mark.parametrize("name", ["x.safetensors", "deep/x.safetensors", "x.pt", "pytorch_model.bin"])
def test_the_name_of_a_file_is_no_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(wl.CheckpointError, match="is the name of a file; save writes files into a folder") as caught:
        wl.save(Net(), path)
    assert not path.exists() and str(path.parent) in str(caught.value)
    model = Net()
    wl.save(model, path.parent, name=path.stem)  # as the message says
    assert same(wl.load(Net, path.with_suffix(".safetensors")), model)
    folder = tmp_path / "other" / name
    folder.mkdir(parents=True)  # a folder of that name may be meant
    wl.save(model, folder)
    assert same(wl.load(Net, folder), model)


def test_the_name_comes_without_its_ending(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name comes without \.safetensors"):
        wl.save(Net(), tmp_path, name="model.safetensors")


@pytest.mark.parametrize("given", [nn.Linear(2, 2, device="meta"), {"model": {"w": torch.ones(1)}}])
def test_what_is_refused_is_not_called_a_checkpoint(tmp_path: Path, given: Any) -> None:
    with pytest.raises(wl.CheckpointError, match=r"^cannot be saved as safetensors") as caught:
        wl.save(given, tmp_path)
    assert "<mapping>" not in str(caught.value) and "torch.load" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("mine")
    with pytest.raises(wl.CheckpointError, match="is a file; save writes files into a folder"):
        wl.save(Net(), path)
    with pytest.raises(wl.TransferError, match="the folder can't be made"):
        wl.save(Net(), path / "inside")
    assert path.read_text() == "mine"


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    state = {
        "fine": torch.ones(1),
        "complex": torch.ones(1, dtype=torch.complex128),
        "meta": torch.ones(1, device="meta"),
        "sparse": torch.ones(2, 2).to_sparse(),
    }
    with pytest.raises(wl.CheckpointError, match="meta") as caught:
        wl.save(state, tmp_path / "a")
    assert {problem.key for problem in caught.value.problems} == {"meta", "sparse"}
    state = {"complex": state["complex"], "text": "x", "__metadata__": torch.ones(1)}  # type: ignore[dict-item]
    with pytest.raises(wl.CheckpointError, match="cannot be saved as safetensors") as caught:
        wl.save(state, tmp_path / "a")
    assert {problem.key for problem in caught.value.problems} == {"complex", "text", "__metadata__"}
    assert not (tmp_path / "a").exists()


def test_a_lazy_module_that_has_not_run_yet(tmp_path: Path) -> None:
    lazy = nn.LazyLinear(2)
    with pytest.raises(wl.CheckpointError, match="weight: is an UninitializedParameter, which has no values yet — run"):
        wl.save(lazy, tmp_path)
    lazy(torch.ones(1, 3))
    wl.save(lazy, tmp_path)


def test_a_header_that_no_reader_takes(tmp_path: Path) -> None:
    wl.save({"weight": torch.ones(1)}, tmp_path)
    with pytest.raises(wl.CheckpointError, match="header would be too long") as caught:
        wl.save({"weight": torch.zeros(1)}, tmp_path, metadata={"text": "x" * 100_000_000})
    assert "less metadata" in str(caught.value)
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")["weight"].item() == 1
    wl.save({"weight": torch.zeros(1)}, tmp_path, metadata={"text": "x" * 99_999_000})
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.metadata()["text"]) == 99_999_000


def test_packed_values_without_a_dimension(tmp_path: Path) -> None:
    with pytest.raises(wl.CheckpointError, match="weight: holds two values"):
        wl.save({"weight": torch.empty((), dtype=torch.float4_e2m1fn_x2)}, tmp_path)


def test_a_checkpoint_that_would_be_read_instead(tmp_path: Path) -> None:
    wl.save(Net(), tmp_path, name="diffusion_pytorch_model")
    with pytest.raises(wl.CheckpointError, match="read instead"):
        wl.save(Net(), tmp_path, name="adapter")
    with pytest.raises(wl.CheckpointError, match="read instead"):
        wl.save(Net(), tmp_path, max_shard_bytes=1500)
    assert os.listdir(tmp_path) == ["diffusion_pytorch_model.safetensors"]
    wl.save(Net(), tmp_path)  # model.safetensors goes first


class _Fails:
    """A tensor's stand-in is not possible, a full disk is: the file size limit of the process makes writing fail."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def __enter__(self) -> None:
        import resource
        import signal

        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit_bytes, self.before[1]))

    def __exit__(self, *_: object) -> None:
        import resource
        import signal

        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


@pytest.mark.parametrize("limit", [5_000_000_000, 1500])
def test_a_disk_that_is_full(tmp_path: Path, limit: int) -> None:
    first = Net()
    wl.save(first, tmp_path, max_shard_bytes=limit)
    before = sorted(os.listdir(tmp_path))
    with _Fails(1800), pytest.raises(wl.TransferError, match="writing failed") as caught:
        wl.save(Net(width=64), tmp_path, max_shard_bytes=limit)
    problem = caught.value.problems[0]
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.EFBIG
    assert problem.key is not None and problem.start is not None
    assert sorted(os.listdir(tmp_path)) == before
    assert same(wl.load(Net, tmp_path), first)


def test_renaming_fails_half_way(tmp_path: Path) -> None:
    """A folder stands where a file has to go: all is put back."""
    first = Net()
    wl.save(first, tmp_path, max_shard_bytes=1500)
    before = sorted(os.listdir(tmp_path))
    obstacle = tmp_path / "model.safetensors" / "file"
    obstacle.parent.mkdir()
    obstacle.touch()
    with pytest.raises(wl.TransferError, match="writing failed"):
        wl.save(Net(), tmp_path)
    obstacle.unlink()
    obstacle.parent.rmdir()
    assert sorted(os.listdir(tmp_path)) == before
    assert same(wl.load(Net, tmp_path), first)


def test_saves_at_the_same_time(tmp_path: Path, at_once: Any) -> None:
    """Eight threads save into one folder: in the end it holds the checkpoint of one of them."""
    models = [Net() for _ in range(8)]
    limits = [5_000_000_000 if number % 2 else 1500 for number in range(8)]
    at_once(lambda number: wl.save(models[number], tmp_path, max_shard_bytes=limits[number]), 8)
    last = wl.load(Net, tmp_path)
    assert sum(same(last, model) for model in models) == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_that_is_forked_meanwhile_does_not_keep_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a DataLoader that start while another thread saves: they live on, and saves go on as well."""
    import fcntl

    end, children = os.pipe(), []

    def write(*args: Any, **kwargs: Any) -> Any:
        child = os.fork()
        if child == 0:
            os.close(end[1])
            os.read(end[0], 1)  # until the test is over
            os._exit(0)
        children.append(child)
        return write_safetensors(*args, **kwargs)

    monkeypatch.setattr("weightlift.checkpoint.save.write_safetensors", write)
    try:
        wl.save(Net(), tmp_path)
        folder = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as the next save takes it, which would wait
        os.close(folder)
    finally:
        os.close(end[1])
        for child in children:
            os.waitpid(child, 0)
        os.close(end[0])


def test_readers_meanwhile_get_old_or_new(tmp_path: Path) -> None:
    """While one file replaces another again and again, a load gives one model, or says that the file changed."""
    models = [Net(), Net()]
    wl.save(models[0], tmp_path)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            wl.save(models[number % 2], tmp_path)

    thread = threading.Thread(target=write)
    thread.start()
    right = 0
    try:
        for number in range(60):
            try:
                found = wl.load(Net, tmp_path, copy=bool(number % 2))
            except wl.CheckpointChanged:
                continue
            assert same(found, models[0]) or same(found, models[1])
            right += 1
    finally:
        stop.set()
        thread.join()
    assert right


def test_a_manifest_that_cannot_be_placed_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Net()
    wl.save(old, tmp_path, manifest=True)
    replace, calls = os.replace, []

    def fail_the_second(*args: str) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EIO, "made to fail")
        replace(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail_the_second)
        with pytest.raises(wl.WeightliftError):
            wl.save(Net(), tmp_path, manifest=True)
    assert same(wl.load(Net, tmp_path, verify=True), old)


@pytest.mark.parametrize("limit", [5_000_000_000, 1500])
def test_an_interrupt_during_the_renames_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Before or after each rename in turn, as Ctrl-C may come."""
    models = Net(), Net()
    rename, replace = os.rename, os.replace
    moments = itertools.count()
    interrupted = True
    while interrupted:
        moment = next(moments)
        left = [moment // 2]
        folder = tmp_path / f"{moment}"
        wl.save(models[0], folder, max_shard_bytes=1500)
        before = sorted(os.listdir(folder))

        def interrupts(call: Any, *args: Any, left: list[int] = left, late: int = moment % 2) -> None:
            left[0] -= 1
            if left[0] == -1 and not late:
                raise KeyboardInterrupt
            call(*args)
            if left[0] == -1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", functools.partial(interrupts, rename))
            patch.setattr(os, "replace", functools.partial(interrupts, replace))
            try:
                wl.save(models[1], folder, max_shard_bytes=limit)
                interrupted = False
            except KeyboardInterrupt:
                assert sorted(os.listdir(folder)) == before
        assert same(wl.load(Net, folder), models[not interrupted])
    assert moment > 6


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("limit", [5_000_000_000, 1500])
def test_what_was_private_stays_private(tmp_path: Path, limit: int) -> None:
    wl.save(Net(), tmp_path, manifest=True)
    new = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(tmp_path)}
    (tmp_path / "ordinary").touch()
    assert set(new.values()) == {stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)}  # as the umask says
    (tmp_path / "ordinary").unlink()
    (tmp_path / "model.safetensors").chmod(0o600)
    wl.save(Net(), tmp_path, max_shard_bytes=limit, manifest=True)
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(tmp_path)} == {0o600}


def test_names_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(wl.CheckpointError, match="surrogate pair"):
        wl.save({"a\udcff": torch.zeros(1)}, tmp_path)
    with pytest.raises(ValueError, match=r"metadata\['author'\]"):
        wl.save({"a": torch.zeros(1)}, tmp_path, metadata={"author": "\udcff"})
    with pytest.raises(TypeError, match="metadata must be a mapping"):
        wl.save({"a": torch.zeros(1)}, tmp_path, metadata=["author"])  # type: ignore[arg-type]
    assert not os.listdir(tmp_path)


def test_a_name_that_is_too_long_for_the_system(tmp_path: Path) -> None:
    with pytest.raises(wl.TransferError, match="too long"):
        wl.save(Net(), tmp_path, name="n" * 300)
    assert not os.listdir(tmp_path)
