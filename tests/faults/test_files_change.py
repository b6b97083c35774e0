"""Files that are replaced, cut, written to or deleted at every moment of a load, through the public interface.

The moments: after the checkpoint was opened, while the constructor runs, after the plan was made, and while the
transfer reports its progress (everything small is mapped or being read by then).
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.transfer.sources import FileSource

ROOT = Path(__file__).resolve().parents[2]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Parameter(torch.randn(800, 1000))
        self.other = nn.Linear(30, 30)


def replace(path: Path) -> None:
    wl.save(Net(), path.parent)


def cut(path: Path) -> None:
    os.truncate(path, 5000)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(10_000)
        file.write(b"\1" * 1000)


def delete(path: Path) -> None:
    path.unlink()


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = [replace, cut, cut_to_nothing, overwrite, delete, grow, become_a_pipe]


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("moment", ["opened", "constructing", "planned"])
@pytest.mark.parametrize("change", CHANGES)
def test_before_anything_is_read(tmp_path: Path, change: Callable[[Path], None], moment: str, copy: bool) -> None:
    path = wl.save(Net(), tmp_path)[0]

    def build() -> Net:
        if moment == "constructing":
            change(path)
        return Net()

    checkpoint = wl.open_checkpoint(path)
    if moment == "opened":
        change(path)
    with pytest.raises(wl.CheckpointChanged, match=r"the file changed|the file is gone") as caught:
        plan = wl.plan(build, checkpoint, copy=copy)
        if moment == "planned":
            change(path)
        plan.execute()
    assert [problem.file for problem in caught.value.problems] == [path]
    with pytest.raises((wl.CheckpointChanged, wl.CheckpointError)):
        checkpoint.read("other.bias")


@pytest.mark.parametrize("copy", [False, True])
def test_a_file_that_goes_once_all_were_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: bool
) -> None:
    """As one does that is moved aside by a save."""
    path = wl.save(Net(), tmp_path)[0]
    plan = wl.plan(Net, path, copy=copy)
    look = FileSource.check

    def last_look(source: FileSource, file: wl.ShardFile) -> wl.Problem | None:
        found = look(source, file)
        path.unlink()
        return found

    monkeypatch.setattr(FileSource, "check", last_look)
    with pytest.raises(wl.CheckpointChanged, match="the file is gone"):
        plan.execute()


@pytest.mark.parametrize("way", ["copied", "cast", "in place", "mapped and cast"])
@pytest.mark.parametrize("change", CHANGES)
def test_while_it_is_read(tmp_path: Path, change: Callable[[Path], None], way: str) -> None:
    """At the first report of progress: an error, or values of the file that was planned with. Never another value."""
    saved = Net()
    path = wl.save(saved, tmp_path)[0]
    done = []

    def report(finished: int, total: int) -> None:
        if not done and (finished or way == "cast"):
            done.append(finished)
            change(path)

    options: dict[str, object] = {
        "copied": {"copy": True},
        "cast": {"dtype": torch.float64},
        "in place": {},
        "mapped and cast": {"dtype": {"other.*": torch.float64}},
    }[way]  # type: ignore[assignment]
    target = Net() if way == "in place" else Net
    try:
        made = wl.load(target, path, progress=report, workers=1, **options)  # type: ignore[arg-type, call-overload]
    except (wl.CheckpointChanged, wl.TransferError) as error:
        assert [problem.file for problem in error.problems] == [path]
        if way == "in place":
            assert isinstance(error, wl.TransferError) and error.written
        assert done
        return
    assert done
    assert change in (replace, delete, become_a_pipe), "cut or written to, and nothing said"
    for key, value in saved.state_dict().items():
        assert torch.equal(made.state_dict()[key].float(), value), key


def test_what_a_cut_file_does_to_a_mapped_model(tmp_path: Path) -> None:
    """The one fault that can't be told: the documents say so. ``copy=True`` is the way out."""
    code = f"""
        import os, sys
        sys.path.insert(0, {str(ROOT / "tests" / "faults")!r})
        import torch, weightlift as wl
        from test_files_change import Net
        path = wl.save(Net(), {str(tmp_path)!r})[0]
        model = wl.load(Net, path, copy=sys.argv[1] == "copy")
        os.truncate(path, 0)
        print(bool(model.big.sum() != 0), flush=True)
    """

    def run(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), how], capture_output=True, text=True, timeout=100, check=False
        )

    copied = run("copy")
    assert (copied.returncode, copied.stdout) == (0, "True\n"), copied.stderr
    if sys.platform == "linux":
        assert run("map").returncode == -7  # SIGBUS
