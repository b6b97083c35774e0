"""``verify=True``: a flipped bit is found, wherever it is and however the hash is known; without it nobody looks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.checkpoint import verify
from weightlift.cli.main import main


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)


def flip(path: Path, offset: int = -100) -> None:
    """Change one bit in place and keep the times, as a failing disk does."""
    path = path.resolve()
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def manifest(folder: Path) -> Path:
    """What `weightlift.save` writes."""
    wl.save(Net(), folder, max_shard_bytes=20_000, manifest=True)
    return folder


def sha256sum(folder: Path) -> Path:
    """What sha256sum writes."""
    wl.save(Net(), folder, max_shard_bytes=20_000)
    files = sorted(path.name for path in folder.iterdir())
    text = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()} *./{name}\n" for name in files)
    (folder / "SHA256SUMS").write_text(text)
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0
    return folder


def hub_cache(folder: Path) -> Path:
    """Links from a snapshot to blobs that are named by sha256, and a small file by git's sha1."""
    wl.save(Net(), folder / "made", max_shard_bytes=20_000)
    blobs, snapshot = folder / "models--x--y" / "blobs", folder / "models--x--y" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (folder / "made").iterdir():
        data = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        name = git if path.suffix == ".json" else hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / name, snapshot))
    return snapshot


def local_dir(folder: Path) -> Path:
    """What ``hf download --local-dir`` leaves."""
    wl.save(Net(), folder)
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (notes / "model.safetensors.metadata").write_text(f"{'c' * 40}\n{digest}\n1700000000.0\n")
    return folder


def local_dir_of_a_pipeline(folder: Path) -> Path:
    """The same of a repository with folders: the notes on all of them lie in the uppermost one."""
    wl.save(Net(), folder / "unet")
    notes = folder / ".cache" / "huggingface" / "download" / "unet"
    notes.mkdir(parents=True)
    digest = hashlib.sha256((folder / "unet" / "model.safetensors").read_bytes()).hexdigest()
    (notes / "model.safetensors.metadata").write_text(f"{'c' * 40}\n{digest}\n1700000000.0\n")
    return folder / "unet"


MAKERS = [manifest, sha256sum, hub_cache, local_dir, local_dir_of_a_pipeline]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_flipped_bit(tmp_path: Path, make: Callable[[Path], Path], copy: bool, workers: int) -> None:
    folder = make(tmp_path)
    good = wl.load(Net, folder, verify=True, copy=copy, workers=workers)
    assert not good.a.weight.is_meta
    wl.open_checkpoint(folder, verify=True)
    assert verify(folder, content=True) == ()
    victim = sorted(folder.glob("*.safetensors"))[-1]
    flip(victim)
    wl.load(Net, folder, copy=copy)  # nobody looks
    with pytest.raises(wl.CheckpointCorrupt, match="content of the file is not what it should be") as caught:
        wl.load(Net, folder, verify=True, copy=copy, workers=workers)
    problem = caught.value.problems[0]
    assert problem.file == victim and "sha256" in str(problem.expected) and len(str(problem.found)) == 64
    with pytest.raises(wl.CheckpointCorrupt):
        wl.open_checkpoint(folder, verify=True)
    assert [p.file for p in verify(folder, content=True)] == [victim]
    assert verify(folder) == ()
    made = wl.plan(Net, folder, verify=True)  # a plan reads no tensor
    with pytest.raises(wl.CheckpointCorrupt):
        made.execute()


def test_an_existing_module_is_not_touched(tmp_path: Path) -> None:
    folder = manifest(tmp_path)
    module = Net()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    flip(sorted(folder.glob("*.safetensors"))[0])
    with pytest.raises(wl.CheckpointCorrupt):
        wl.load(module, folder, verify=True)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    wl.load(module, manifest(tmp_path), verify=True)
    assert not any(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    folder = manifest(tmp_path)
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        flip(path)
    with pytest.raises(wl.CheckpointCorrupt) as caught:
        wl.load(Net, folder, verify=True)
    assert sorted(problem.file for problem in caught.value.problems) == files


@pytest.mark.parametrize("limit", [5_000_000_000, 20_000])
def test_what_nobody_wrote_a_hash_of_is_not_called_corrupt(tmp_path: Path, limit: int) -> None:
    (path, *more) = wl.save(Net(), tmp_path, max_shard_bytes=limit)
    assert bool(more) == (limit == 20_000)
    for call in (lambda: wl.load(Net, tmp_path, verify=True), lambda: wl.open_checkpoint(tmp_path, verify=True)):
        with pytest.raises(wl.CheckpointError, match=r"^cannot check the content of the checkpoint") as caught:
            call()
        assert not isinstance(caught.value, wl.CheckpointCorrupt)
    wl.save(Net(), tmp_path, max_shard_bytes=limit, manifest=True)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {path.name}\n")
    with pytest.raises(wl.CheckpointCorrupt):
        wl.open_checkpoint(tmp_path, verify=True)


@pytest.mark.parametrize("make", [manifest, hub_cache])
def test_the_index_is_checked_too(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path)
    index = (folder / "model.safetensors.index.json").resolve()
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 1
    index.write_text(json.dumps(content))
    wl.load(Net, folder)
    for call in (lambda: wl.plan(Net, folder, verify=True), lambda: wl.open_checkpoint(folder, verify=True)):
        with pytest.raises(wl.CheckpointCorrupt) as caught:
            call()
        assert [problem.file for problem in caught.value.problems] == [folder / index.name] or make is hub_cache


def test_no_hash_is_known(tmp_path: Path) -> None:
    wl.save(Net(), tmp_path)
    for call in (
        lambda: wl.load(Net, tmp_path, verify=True),
        lambda: wl.plan(Net, tmp_path, verify=True),
        lambda: wl.open_checkpoint(tmp_path, verify=True),
    ):
        with pytest.raises(wl.CheckpointError, match="no hash is written down"):
            call()
    wl.load(Net, Net().state_dict(), verify=True)  # values in memory come from no disk


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("not a sum\n", "line 1 is not of the form"),
        (f"{'0' * 64}  model.safetensors\n{'1' * 64}  model.safetensors\n", "line 2 gives another hash"),
    ],
)
def test_a_broken_manifest(tmp_path: Path, text: str, what: str) -> None:
    wl.save(Net(), tmp_path)
    (tmp_path / "SHA256SUMS").write_text(text)
    with pytest.raises(wl.CheckpointError, match=what):
        wl.load(Net, tmp_path, verify=True)


FORMS = {
    "bsd": "SHA256 ({name}) = {digest}\n",
    "openssl 1": "SHA256({name})= {digest}\n",
    "openssl 3": "SHA2-256({name})= {digest}\n",
    "in capitals": "{capitals}  {name}\n",
    "another system's lines": "{digest} *{name}\r\n",
    "a comment and empty lines": "# made by hand\n\n{digest}  {name}\n\n",
    "other files": "{digest}  {name}\n\\{zeros}  a\\nb\nSHA256 (c (d) = e) = {zeros}\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_manifest(tmp_path: Path, form: str, encoding: str) -> None:
    (path,) = wl.save(Net(), tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    text = FORMS[form].format(name=path.name, digest=digest, capitals=digest.upper(), zeros="0" * 64)
    (tmp_path / "SHA256SUMS").write_bytes(text.encode(encoding))
    wl.load(Net, tmp_path, verify=True)
    flip(path)
    with pytest.raises(wl.CheckpointCorrupt):
        wl.load(Net, tmp_path, verify=True)


@pytest.mark.parametrize("tag", [(), ("--tag",), ("--binary",)], ids=str)
@pytest.mark.skipif(not shutil.which("sha256sum") or os.name == "nt", reason="needs sha256sum")
def test_odd_names_as_sha256sum_writes_them(tmp_path: Path, tag: tuple[str, ...]) -> None:
    (path,) = wl.save(Net(), tmp_path)
    odd = path.rename(tmp_path / "odd\\name\nwith (all) = of it.safetensors")
    done = subprocess.run(["sha256sum", *tag, odd.name], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.startswith(b"\\")
    (tmp_path / "SHA256SUMS").write_bytes(done.stdout)
    wl.load(Net, odd, verify=True)
    flip(odd)
    with pytest.raises(wl.CheckpointCorrupt):
        wl.load(Net, odd, verify=True)


def test_progress_and_cancel(tmp_path: Path) -> None:
    folder = manifest(tmp_path)
    seen: list[tuple[int, int]] = []
    wl.load(Net, folder, verify=True, copy=True, progress=lambda done, total: seen.append((done, total)))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors")) + wl.open_checkpoint(folder).total_bytes
    assert seen[-1] == (total, total) and seen == sorted(seen)
    stop = threading.Event()
    stop.set()
    with pytest.raises(wl.LoadCancelled):
        wl.load(Net, folder, verify=True, cancel=stop)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = manifest(tmp_path)
    assert main(["verify", "--hash", str(folder)]) == 0
    assert "content as hashed" in capsys.readouterr().out
    flip(sorted(folder.glob("*.safetensors"))[0])
    assert main(["verify", str(folder)]) == 0
    assert main(["verify", "--hash", str(folder)]) == 1
    assert "not what it should be" in capsys.readouterr().out
