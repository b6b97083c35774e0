"""What dead tensors leave for the next load: used again, the system's meanwhile, never more than lived at once."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weightlift as wl
from weightlift import pages
from weightlift.transfer import reuse
from weightlift.transfer.memory import new_tensor
from weightlift.transfer.reuse import Kept

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE") or sys.platform != "linux", reason="only on Linux")
MIB = 1 << 20
MADV_PAGEOUT = 21  # asks the system to take pages now; Linux 5.4, and without a name in Python's mmap


def numbers(name: str = "self") -> dict[str, int]:
    """What the process's memory is, in bytes."""
    lines = Path(f"/proc/{name}/smaps_rollup").read_text().splitlines()[1:]
    return {key: int(rest.split()[0]) << 10 for key, rest in (line.split(":") for line in lines)}


def kept_by(kept: Kept) -> int:
    return sum(block.size_bytes for blocks in kept._by_size.values() for block in blocks) + sum(
        block.size_bytes for block in kept._left
    )


def test_the_next_tensor_of_the_size_gets_the_memory():
    wl.empty_cache()
    value = new_tensor((8 * MIB,), torch.uint8).fill_(3)
    address = value.data_ptr()
    del value
    again = new_tensor((2, MIB), torch.float32)
    assert again.data_ptr() == address
    assert again.is_contiguous() and again.shape == (2, MIB)


def test_what_is_kept_is_the_systems(no_collector):
    wl.empty_cache()
    before = numbers()
    value = new_tensor((64 * MIB,), torch.uint8).fill_(1)
    assert numbers()["LazyFree"] == before["LazyFree"]
    del value
    assert numbers()["LazyFree"] - before["LazyFree"] >= 62 * MIB
    assert wl.empty_cache() == 64 * MIB
    assert numbers()["LazyFree"] == before["LazyFree"]
    assert wl.empty_cache() == 0


def test_what_the_system_took_is_good_memory_all_the_same(no_collector):
    kept = Kept()
    view = kept.take(32 * MIB)
    assert view is not None
    torch.frombuffer(view, dtype=torch.uint8).fill_(7)
    del view
    (block,) = kept._left
    before = numbers()["Rss"]
    pages.advise(block.address, block.size_bytes, MADV_PAGEOUT)
    assert before - numbers()["Rss"] >= 30 * MIB
    again = kept.take(32 * MIB)
    assert again is not None
    tensor = torch.frombuffer(again, dtype=torch.uint8)
    assert int(tensor.max()) == 0  # the system's own zeros, nothing of anybody
    tensor.fill_(9)
    assert int(tensor.min()) == 9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "drop", "empty"]), st.integers(1, 40), st.integers(0, 99))))
def test_never_more_is_kept_than_lived_at_once(steps: list[tuple[str, int, int]]):
    kept = Kept()
    alive: list[memoryview] = []
    most = 0
    for what, amount, which in steps:
        if what == "take":
            view = kept.take(amount * 100_000)
            assert view is not None and len(view) == amount * 100_000
            alive.append(view)
        elif what == "drop" and alive:
            alive.pop(which % len(alive))
            del view
            view = None
        elif what == "empty":
            expected = kept_by(kept)
            assert kept.empty() == expected and kept_by(kept) == 0
        else:
            view = None
        in_use = sum(len(view) for view in alive)
        most = max(most, in_use)
        # A block may be a quarter larger than what it is used for, and pages are whole.
        assert kept_by(kept) + in_use <= 1.25 * most + 4096 * (len(alive) + 60)
        places = sorted((torch.frombuffer(v, dtype=torch.uint8).data_ptr(), len(v)) for v in alive)
        assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(places))


def test_threads_never_get_the_same_memory(at_once):
    kept = Kept()
    wrong: list[Any] = []

    def work(number: int) -> None:
        draw = random.Random(number)
        held: list[tuple[torch.Tensor, int]] = []
        for turn in range(400):
            view = kept.take(draw.choice([MIB // 4, MIB // 2, MIB]))
            assert view is not None
            value = number * 30 + turn % 30
            held.append((torch.frombuffer(view, dtype=torch.uint8).fill_(value), value))
            del view
            if len(held) > 3:
                tensor, value = held.pop(draw.randrange(4))
                if int(tensor.min()) != value or int(tensor.max()) != value:
                    wrong.append((number, turn))
                if turn % 7 == 0:
                    cycle = [tensor]
                    cycle.append(cycle)  # type: ignore[arg-type]
                    del cycle
                del tensor
            if turn % 50 == 0:
                kept.empty()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        at_once(work, 8)
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def address_space() -> tuple[int, int]:
    """Bytes of it that the process has, and in how many mappings."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    return size, len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize(("nbytes", "mappings"), [(2 * MIB, 10), (2 * MIB + 100_000, 210)])
def test_memory_takes_no_more_address_space_than_it_has_bytes(nbytes: int, mappings: int):
    """Whole huge pages lie side by side, which is one mapping for the system; odd sizes are one each."""
    kept = Kept()
    before = address_space()
    views = [kept.take(nbytes) for _ in range(200)]
    assert None not in views
    after = address_space()
    assert after[0] - before[0] <= 200 * (nbytes + mmap.PAGESIZE) + 16 * MIB  # the objects' own
    assert after[1] - before[1] <= mappings
    views.clear()
    kept.empty()
    assert address_space()[0] - before[0] <= 16 * MIB


def test_memory_begins_at_a_huge_page_and_lies_on_them():
    kept = Kept()
    views = [kept.take(nbytes) for nbytes in (2 * MIB, 5 * MIB + 1, 3 * MIB, 64 * MIB)]
    for view in views:
        assert view is not None
        assert torch.frombuffer(view, dtype=torch.uint8).fill_(1).data_ptr() % (2 * MIB) == 0


def test_no_more_blocks_than_the_system_has_mappings_for():
    kept = Kept(most_blocks=3)
    views = [kept.take(MIB) for _ in range(4)]
    assert [view is None for view in views] == [False, False, False, True]
    views.pop(0)
    assert kept.take(3 * MIB) is not None  # in the place of what was kept
    assert Kept()._most_blocks == int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    views.clear()
    assert kept.empty() == 5 * MIB and not kept._living


class At:
    """Calls a function at the n-th of the places in `reuse` at which a signal's handler may run."""

    def __init__(self, number: int, call: Callable[[], object]) -> None:
        self.left = number
        self._call = call

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        # Python drops what is raised in the one finaliser that gives memory back, and the block stays mapped.
        if event in ("call", "c_return") and code.co_filename == reuse.__file__ and code.co_name != "_unmap":
            self.left -= 1
            if self.left == 0:
                self._call()


def interrupted(kept: Kept, call: Callable[[], object]) -> int:
    """Use ``kept`` with ``call`` at every such place in turn; how many there are."""
    for number in itertools.count(1):
        at = At(number, call)
        sys.setprofile(at)
        try:
            views = [kept.take(size * MIB) for size in (1, 1, 2, 3)]
            views.clear()
            views = [kept.take(size * MIB) for size in (1, 2, 1, 4)]
            del views
            kept.empty()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        views = [kept.take(size * MIB) for size in (1, 1, 2, 3, 4)]
        assert None not in views
        places = [torch.frombuffer(view, dtype=torch.uint8).data_ptr() for view in views]
        assert len(set(places)) == 5
        views.clear()
        assert kept_by(kept) >= 11 * MIB
        kept.empty()
        assert not kept._living, number
        if at.left > 0:
            return number - 1
    raise AssertionError


def test_a_signals_handler_may_load_and_empty(no_collector):
    kept, other = Kept(), []

    def handler() -> None:
        other.append(kept.take(MIB))
        kept.empty()
        other.clear()

    assert interrupted(kept, handler) > 100


def test_an_interrupt_leaves_nothing_half_done(no_collector, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: None)  # pytest's keeps what was raised in a finaliser

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert interrupted(Kept(), interrupt) > 100


def test_a_process_with_limited_address_space_keeps_nothing():
    code = """
import resource, sys
import torch
import weightlift as wl
from weightlift.transfer.memory import new_tensor
new_tensor((8 << 20,), torch.uint8)
print(wl.empty_cache())
resource.setrlimit(getattr(resource, sys.argv[1]), (1 << 45, 1 << 45))
new_tensor((8 << 20,), torch.uint8)
print(wl.empty_cache())
"""
    for limit in ("RLIMIT_AS", "RLIMIT_DATA"):
        done = subprocess.run([sys.executable, "-c", code, limit], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(8 << 20), "0"], limit


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_forked_child_may_share_is_not_kept():
    wl.empty_cache()
    lived = new_tensor((8 * MIB,), torch.uint8).fill_(1)
    kept = new_tensor((16 * MIB,), torch.uint8).fill_(2)
    del kept
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            in_child = wl.empty_cache()  # the parent's
            del lived
            shared = wl.empty_cache()  # what was shared
            own = new_tensor((4 * MIB,), torch.uint8)
            del own
            code = 0 if (in_child, shared, wl.empty_cache()) == (0, 0, 4 * MIB) else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    del lived
    again = new_tensor((16 * MIB,), torch.uint8)  # no child shares what was kept: it is kept once more
    del again
    assert wl.empty_cache() == 16 * MIB


def test_a_load_into_memory_that_was_used_before(tmp_path: Path):
    """Every byte is written: nothing of an earlier model shows, whatever the shape, the cast or the order."""
    wl.empty_cache()
    state = {f"{i}.weight": torch.randn(1500, 1000) for i in range(4)}
    wl.save(state, tmp_path)

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(*(torch.nn.Linear(1000, 1500, bias=False) for _ in range(4)))

    for dtype in (torch.float64, torch.float32, torch.float64):
        model = wl.load(build, tmp_path, dtype=dtype, copy=True)
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name].to(dtype)), name
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        del model, value, parameter
