"""What people do with a model after its weights were mapped: the file never changes, nobody sees another's writes."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.transfer.memory import mappings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.last = nn.Linear(128, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))  # type: ignore[no-any-return]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint whose bytes are the same after the test, unless the test deleted it."""
    made = wl.save(Net(), tmp_path)[0]
    before = hashlib.sha256(made.read_bytes()).hexdigest()
    yield made
    if made.exists():
        assert hashlib.sha256(made.read_bytes()).hexdigest() == before


@pytest.fixture
def model(path: Path) -> Net:
    loaded = wl.load(Net, path)
    if sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()
    return loaded


def state_of(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = wl.open_checkpoint(path)
    return {key: checkpoint.read(key) for key in checkpoint}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value.cpu(), state[key]) for key, value in model.state_dict().items())


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()


def test_training_writes_to_copies(path: Path, model: Net) -> None:
    other, before = wl.load(Net, path), state_of(path)
    copied = wl.load(Net, path, copy=True)
    for _ in range(3):
        step(model)
        step(copied)
    assert same(other, before) and same(wl.load(Net, path), before)
    assert not same(model, before)
    assert same(model, copied.state_dict())


def test_moving_and_casting(path: Path, model: Net) -> None:
    before = state_of(path)
    model.to(torch.float64).to(torch.float32).to("cpu")
    assert same(model, before)
    model.half()
    assert model.first.weight.dtype == torch.float16
    if torch.cuda.is_available():
        moved = wl.load(Net, path).to("cuda")
        assert same(moved, before)
        assert same(wl.load(Net, path).to("cuda", non_blocking=True), before)
        pinned = wl.load(Net, path).first.weight.detach().pin_memory()
        assert pinned.is_pinned() and torch.equal(pinned, before["first.weight"])


def test_share_memory(path: Path, model: Net) -> None:
    before = state_of(path)
    model.share_memory()
    assert model.first.weight.is_shared() and same(model, before)
    step(model)
    assert same(wl.load(Net, path), before)


def test_deepcopy_and_state_dict_round_trip(path: Path, model: Net, tmp_path: Path) -> None:
    import copy

    before = state_of(path)
    twin = copy.deepcopy(model)
    step(twin)
    assert same(model, before)
    torch.save(model.state_dict(), tmp_path / "other.pt")
    assert same(wl.load(Net, tmp_path / "other.pt"), before)
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    assert same(fresh, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork(path: Path, model: Net) -> None:
    """A child's writes are its own."""
    before = state_of(path)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with torch.no_grad():
                right = same(model, before)
                model.first.weight.add_(1)
                code = 0 if right and not same(model, before) else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert same(model, before) and same(wl.load(Net, path), before)


def test_the_file_is_deleted_or_replaced(path: Path, model: Net) -> None:
    before = state_of(path)
    wl.save(Net(), path.parent)  # renamed over it
    assert same(model, before)
    path.unlink()
    assert same(model, before)
    step(model)
    assert not same(model, before)


@pytest.mark.parametrize("way", ["existing", "copied", "mapped"])
def test_torch_saves_to_the_file_that_was_loaded(tmp_path: Path, way: str) -> None:
    """docs/checkpoints.md, Saving. The first two own their memory, the last is killed while it writes."""
    program = """
        import sys, torch, weightlift as wl
        from torch import nn
        way, path = sys.argv[1:]
        build = lambda: nn.Linear(512, 512)
        model = wl.load(build() if way == "existing" else build, path, copy=way == "copied")
        torch.save(model.state_dict(), path)
    """
    path = tmp_path / "last.pt"
    state = nn.Linear(512, 512).state_dict()
    torch.save(state, path)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), way, path], check=False)
    if way == "mapped":
        assert done.returncode < 0 or sys.platform != "linux"
    else:
        assert done.returncode == 0 and same(wl.load(lambda: nn.Linear(512, 512), path), state)


def test_the_model_outlives_its_checkpoint_object_and_pages_go_with_it(path: Path) -> None:
    import gc

    def mapped() -> int:
        return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    if sys.platform != "linux":
        pytest.skip("needs /proc")
    model = wl.load(Net, path)
    weight = model.first.weight
    del model
    gc.collect()
    assert mapped() == 1 and bool(weight.sum() != 0)
    del weight
    gc.collect()
    assert mapped() == 0


def _in_process(code: str, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


_START = """
        import sys, torch
        from pathlib import Path
        sys.path.insert(0, {here!r})
        from test_after_mapping import Net, same, state_of, step
        import weightlift as wl
        path = Path(sys.argv[1])
        before, model = state_of(path), wl.load(Net, path)
"""


def test_ddp_of_one_rank(path: Path) -> None:
    start = textwrap.dedent(_START.format(here=str(Path(__file__).parent)))
    code = start + textwrap.dedent("""
        import tempfile, torch.distributed as dist
        from tests.distributed.ending import leave
        from torch.nn.parallel import DistributedDataParallel
        store = dist.FileStore(tempfile.mktemp(), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        wrapped = DistributedDataParallel(model)
        assert same(model, before)
        step(wrapped)
        plain = wl.load(Net, path, copy=True)
        step(plain)
        assert same(model, plain.state_dict()) and same(wl.load(Net, path), before)
        leave()
    """)
    _in_process(code, path)


@pytest.mark.full
def test_compile(path: Path) -> None:
    start = textwrap.dedent(_START.format(here=str(Path(__file__).parent)))
    code = start + textwrap.dedent("""
        x = torch.randn(5, 64)
        with torch.no_grad():
            expected = model(x)
            got = torch.compile(model)(x)
        assert torch.allclose(got, expected, atol=1e-5)
        step(model)
        assert same(wl.load(Net, path), before)
    """)
    _in_process(code, path)


def test_no_module_has_no_files() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, found str"):
        wl.mapped_files("model.safetensors")


def test_which_files_a_model_is_mapped_from(path: Path) -> None:
    gc.collect()
    model = wl.load(Net, path)
    names = tuple(dict(model.named_parameters()))
    assert wl.mapped_files(model) == {path: names}
    assert wl.mapped_files(wl.load(Net, path, copy=True)) == {}
    other = wl.load(Net, path)
    with torch.no_grad():
        other.first.weight.add_(1)  # its pages are copies now, its mapping is not gone
    assert wl.mapped_files(other) == {path: names}
    model.first.to(torch.float64)
    assert wl.mapped_files(model) == {path: ("last.weight", "last.bias")}
    model.last = nn.Linear(128, 8)
    assert wl.mapped_files(model) == {}
    del other
    gc.collect()
    assert not any(mapped == path for _, _, mapped in mappings())
