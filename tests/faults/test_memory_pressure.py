"""Limits just above what a load needs are enough; below, a clear error comes before anything is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.transfer import headroom

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are read from /proc")

_CODE = """
    import json, resource, sys
    import torch, weightlift as wl
    from torch import nn
    path, limit, extra, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    width, count = how.pop("layers", (2048, 12))
    def build():
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
    if "dtype" in how:
        how["dtype"] = getattr(torch, how["dtype"])
    wl.load(lambda: nn.Linear(2, 2), nn.Linear(2, 2).state_dict())  # what is imported and started once
    field = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[limit]
    lines = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    used = int(lines[field].split()[0]) * 1024
    number = getattr(resource, limit)
    resource.setrlimit(number, (used + extra, resource.getrlimit(number)[1]))
    reads = []
    try:
        model = wl.load(build, path, workers=2, progress=lambda done, total: reads.append(done), **how)
        print("right" if all(bool((layer.weight == i + 1).all()) for i, layer in enumerate(model)) else "wrong")
    except wl.TransferError as error:
        print("nothing was read" if not any(reads) else "reading began", "|", error)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 MiB."""
    state = {f"{i}.weight": torch.full((2048, 2048), i + 1.0) for i in range(12)}
    return wl.save(state, tmp_path_factory.mktemp("big"))[0]


def load(path: Path, limit: str, extra_bytes: int, **how: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_CODE), str(path), limit, str(extra_bytes), json.dumps(how)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("limit", "how", "enough", "little"),
    [
        # Address space: the deferred module's reservation of 192 MiB, the copy, threads' stacks and arenas.
        pytest.param("RLIMIT_AS", {"copy": True}, 900, 330, marks=pytest.mark.full),
        # Private writable memory counts reservations too, as long as they are not sealed.
        ("RLIMIT_DATA", {"copy": True}, 500, 330),
        pytest.param("RLIMIT_DATA", {"dtype": "bfloat16"}, 400, 230, marks=pytest.mark.full),
    ],
)
def test_process_limits(path: Path, limit: str, how: dict[str, object], enough: int, little: int) -> None:
    assert load(path, limit, enough * MIB, **how) == "right"
    told = load(path, limit, little * MIB, **how)
    assert told.startswith("nothing was read |") and "not enough memory" in told and limit in told, told
    assert "copy=False" not in told and "a higher limit" in told, told  # that counts what is mapped as well


def test_many_tensors_need_the_room_that_they_say(tmp_path: Path) -> None:
    """96 of 2.25 MiB under `RLIMIT_DATA`: 216 MiB reserved, and 216 that are filled."""
    state = {f"{i}.weight": torch.full((768, 768), i + 1.0) for i in range(96)}
    (path,) = wl.save(state, tmp_path)
    del state
    assert load(path, "RLIMIT_DATA", 480 * MIB, copy=True, layers=(768, 96)) == "right"


def test_what_is_mapped_needs_no_room(path: Path) -> None:
    assert load(path, "RLIMIT_DATA", 420 * MIB) == "right"


def test_what_a_limit_does_not_let_be_mapped_can_not_be_copied_either(path: Path) -> None:
    told = load(path, "RLIMIT_DATA", 100 * MIB)
    assert "cannot be mapped" in told and "copy=True" not in told and "a higher limit" in told, told


GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@pytest.fixture
def new_group() -> Iterator[Callable[[], tuple[Path, str]]]:
    """Makes control groups of our own, each with its limit's file, where the system lets us make one."""
    made: list[Path] = []

    def new() -> tuple[Path, str]:
        for folder, limit in zip(GROUPS, ("memory.limit_in_bytes", "memory.max")):
            group = folder / f"weightlift-test-{os.getpid()}-{len(made)}"
            try:
                group.mkdir()
            except OSError:
                continue
            if (group / limit).exists():
                made.append(group)
                return group, limit
            group.rmdir()
        pytest.skip("no control group for memory can be made here")

    yield new
    for group in made:
        group.rmdir()


_IN_GROUP = """
    import os, sys
    from pathlib import Path
    import torch, weightlift as wl
    from torch import nn
    path, group, limit, extra, how = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
    def build():
        return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))
    wl.load(lambda: nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), copy=True)
    (group / "cgroup.procs").write_text(str(os.getpid()))
    usage = "memory.usage_in_bytes" if "limit" in limit else "memory.current"
    (group / limit).write_text(str(int((group / usage).read_text()) + extra))
    reads = []
    try:
        model = wl.load(
            build, path, workers=2, progress=lambda done, total: reads.append(done),
            **({"copy": True} if how == "copy" else {"dtype": torch.float64}),
        )
        print("right" if all(bool((layer.weight == i + 1).all()) for i, layer in enumerate(model)) else "wrong")
    except wl.TransferError as error:
        print("nothing was read" if not any(reads) else "reading began", "|", error)
"""


@pytest.mark.parametrize(("how", "needed"), [("copy", 192), ("double", 384)])
def test_a_real_control_group(
    path: Path, new_group: Callable[[], tuple[Path, str]], how: str, needed: int
) -> None:
    def told(extra_bytes: int) -> str:
        group, limit = new_group()  # what one reads of the file may count as its group's, and can be taken back
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_IN_GROUP), str(path), str(group), limit, str(extra_bytes), how],
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
        return done.stdout.strip()

    assert told((needed + 64) * MIB) == "right"
    refused = told((needed - 32) * MIB)
    assert refused.startswith("nothing was read |") and "the control group's limit" in refused, refused


_AFTER_ANOTHER = """
    import os, sys
    from pathlib import Path
    import torch, weightlift as wl
    from torch import nn
    path, group, limit = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    def build():
        return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))
    def right(model):
        return all(bool((layer.weight == i + 1).all()) for i, layer in enumerate(model))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    usage = "memory.usage_in_bytes" if "limit" in limit else "memory.current"
    (group / limit).write_text(str(int((group / usage).read_text()) + (280 << 20)))
    seen = []
    for _ in range(3):
        model = wl.load(build, path, copy=True, workers=2)  # 192 MiB
        seen.append(right(model))
        del model
        seen.append(bool(torch.ones(240 << 18).sum() == 240 << 18))  # 240 MiB that are not the library's
    print(seen, wl.empty_cache() > 0)
"""


def test_what_is_kept_is_in_nobodys_way_in_a_group(path: Path, new_group: Callable[[], tuple[Path, str]]) -> None:
    group, limit = new_group()
    """What one model leaves for the next is taken by whoever needs it: with a limit that both do not fit under."""
    code = textwrap.dedent(_AFTER_ANOTHER)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(group), limit],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    assert done.stdout.split("\n")[0] == f"{[True] * 6} True"


_LIMITED_LATER = """
    import resource, sys
    from pathlib import Path
    import torch, weightlift as wl
    from torch import nn
    def build():
        return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))
    wl.load(build, sys.argv[1], dtype=torch.float64, workers=1)  # leaves 384 MiB
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in lines if line.startswith("VmData")) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20),) * 2)
    model = wl.load(build, sys.argv[1], copy=True, workers=1)  # 192 MiB, in blocks of another size
    print(all(bool((layer.weight == i + 1).all()) for i, layer in enumerate(model)))
"""


def test_what_is_kept_makes_room_under_a_limit_that_came_later(path: Path) -> None:
    code = textwrap.dedent(_LIMITED_LATER)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "True"


@pytest.fixture
def full_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control group with no room, for loads of any size."""
    monkeypatch.setattr(headroom, "_SMALL_BYTES", 1)
    monkeypatch.setattr(headroom, "_of_group", lambda: iter([("the control group's limit", 0)]))


class Shared(nn.Module):
    """Two parameters on one storage: cast together, into one new one."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.zeros(64, 64)
        self.first, self.second = nn.Parameter(whole[:32]), nn.Parameter(whole[32:])


def test_storages_that_are_cast_need_room(full_group: None) -> None:
    state = Shared().state_dict()
    wl.load(Shared, state)
    with pytest.raises(wl.TransferError, match=r"nothing was read.*storages that are converted"):
        wl.load(Shared, state, dtype=torch.bfloat16)


def test_tensors_made_of_parts_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4))
    mixtral.save_pretrained(tmp_path)
    experts = sum(p.nbytes for name, p in mixtral.named_parameters() if ".experts." in name)
    monkeypatch.setattr(headroom, "_SMALL_BYTES", 1)
    for left, fits in ((experts, True), (experts - 1, False)):
        monkeypatch.setattr(headroom, "_of_group", lambda left=left: iter([("the control group's limit", left)]))
        if fits:
            wl.from_pretrained(type(mixtral), tmp_path)
        else:
            with pytest.raises(wl.TransferError, match="nothing was read"):
                wl.from_pretrained(type(mixtral), tmp_path)


def test_control_groups(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "memory.current").write_text("900000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000000\nactive_file 20000000\n")
    found = list(headroom._of_folder(tmp_path, "memory.max", "memory.current"))
    assert [left for _, left in found] == [220_000_000]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(headroom._of_folder(tmp_path, "memory.max", "memory.current")) == []


def test_more_than_the_system_has() -> None:
    headroom.require(100 * MIB, "a test")
    with pytest.raises(wl.TransferError, match="there is not enough memory for a test"):
        headroom.require(1 << 50, "a test")
