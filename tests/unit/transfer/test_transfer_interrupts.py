"""Ctrl-C at every place of the main thread's Python code, and threads that the system does not give."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

import weightlift as wl
from weightlift.locks import FairLock
from weightlift.transfer.cores import Cores
from weightlift.transfer.pool import Pool
from weightlift.transfer.progress import Reporter

TOLD = ("call", "c_return")  # of `sys.setprofile`: where the interpreter looks for signals, but for jumps back


class Interrupt:
    """Raises KeyboardInterrupt at the n-th such place in Python code of ``files`` that is not within ``without``."""

    def __init__(self, number: int, files: tuple[str, ...], without: str = "") -> None:
        self.left = number
        self._files = files
        self._without = without

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event in TOLD and frame.f_code.co_filename.endswith(self._files) and not self._is_within(frame):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def _is_within(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code.co_name != self._without:
            frame = frame.f_back
        return frame is not None


def places(work: Callable[[], object], *files: str, without: str = "") -> int:
    """Interrupt ``work`` at each place in turn; how many there are."""
    number = 0
    while True:
        number += 1
        interrupt = Interrupt(number, files, without)
        sys.setprofile(interrupt)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        if interrupt.left > 0:
            return number - 1


@pytest.fixture(autouse=True)
def nothing_else():
    """The collector may run somebody's finaliser in between."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.timeout(60)
def test_the_pool_ends_wherever_it_is_interrupted():
    done: list[int] = []

    def execute(item: int) -> int:
        time.sleep(0.002)
        done.append(item)
        return 1

    def work() -> None:
        Pool(range(6), (), execute, workers=2, reporter=Reporter(None, 6), cancel=None).run()

    # Python's own `Thread.start` does leave a thread behind if it is interrupted at some places.
    assert places(work, "pool.py", "threading.py", without="start") > 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weightlift-")]
    before = len(done)
    work()
    assert len(done) == before + 6


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals to a thread")
@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, TimeoutError])
def test_the_pool_waits_for_its_threads_through_a_second_signal(raised: type[BaseException]):
    """Ctrl-C twice, or a handler of SIGTERM that exits: the threads write into tensors until they have ended."""
    main = threading.main_thread().ident
    assert main is not None
    told: list[int] = []
    done: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        told.append(number)
        raise raised

    def is_joining() -> bool:
        frame: FrameType | None = sys._current_frames()[main]
        while frame is not None and frame.f_code.co_name != "_join_all":
            frame = frame.f_back
        return frame is not None

    def execute(item: int) -> int:
        if item == 0:
            for number in (1, 2):
                signal.pthread_kill(main, signal.SIGUSR1)
                while len(told) < number or not (is_joining() or number > 1):
                    time.sleep(0.001)
                time.sleep(0.02)
            done.append(item)
        return 1

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(raised):
            Pool(range(2), (), execute, workers=2, reporter=Reporter(None, 2), cancel=None).run()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done == [0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weightlift-")]


@pytest.mark.timeout(60)
def test_the_lock_between_loads_is_free_wherever_one_is_interrupted():
    lock = FairLock()

    def work() -> None:
        with lock.shared(), lock.alone(), lock.shared():
            pass
        with lock.helping(), lock.shared():
            pass

    assert places(work, "locks.py", "contextlib.py") > 50
    gc.collect()  # generators that were left within lie in cycles with their tracebacks; a load clears these
    assert not (lock._queue or lock._readers or lock._helpers or lock._writer)
    other = threading.Thread(target=lambda: lock.alone().__enter__(), daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive()


_AMBIENT = """
    import gc, json, sys
    import torch, weightlift as wl
    from torch import nn
    from weightlift.locks import LOADING
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.scale = nn.Parameter(torch.randn(3) * 0.02)
            self.read = self.scale.sum().item()
    def ambient():
        of_thread = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        stacks = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
        flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_torch_function_enabled()
        loading = len(LOADING._readers), LOADING._lock._is_owned()
        return [*stacks, *flags, *map(str, of_thread), *loading]
    class Interrupt:
        def __init__(self, number):
            self.left = number
        def __call__(self, frame, event, arg):
            if event in ("call", "c_return"):
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
    state, before, found = Net().state_dict(), ambient(), []
    def work():
        wl.load(Net, state, dtype=torch.float64, workers=1)
    for _ in range(3):
        work()
    gc.disable()
    for number in range(int(sys.argv[1]), 1 << 30, int(sys.argv[2])):
        interrupt, raised, held = Interrupt(number), "nothing", None
        sys.setprofile(interrupt)
        try:
            work()
        except BaseException as error:
            held = error  # as an interactive session keeps it
        finally:
            sys.setprofile(None)
        if interrupt.left > 0:
            break
        raised, now = type(held).__name__, ambient()
        del held
        # What comes in a finaliser is reported there and goes no further.
        if now != before or ambient() != before or raised not in ("KeyboardInterrupt", "NoneType"):
            found.append([number, raised, now, ambient()])
            break
    print(json.dumps([number, found]))
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)])
def test_the_thread_is_left_as_it_was_wherever_a_load_is_interrupted(first: int):
    """Else what it makes afterwards is recorded for a load that is over, and reads as zeros."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_AMBIENT), str(first), "3"],
        capture_output=True, text=True, timeout=190, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    places, found = json.loads(done.stdout)
    assert not found
    assert places > 1000


@pytest.mark.timeout(60)
def test_no_core_is_lost():
    cores = Cores(1)

    def work() -> None:
        with cores, cores.given_back():
            pass

    assert places(work, "cores.py", "threading.py", "contextlib.py") > 10
    taken: list[int] = []

    def take() -> None:
        with cores:
            taken.append(1)

    for _ in range(2):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert taken == [1, 1]


def test_no_more_threads_hold_cores_than_there_are(at_once):
    cores, most, now = Cores(2), 0, 0
    lock = threading.Lock()

    def take(_: int) -> None:
        nonlocal most, now
        for _ in range(20):
            with cores:
                with lock:
                    now += 1
                    most = max(most, now)
                time.sleep(0.0005)
                with lock:
                    now -= 1
                with cores.given_back():
                    pass

    at_once(take, 6)
    assert most == 2


_FEW_THREADS = """
    import sys, threading
    import torch, weightlift as wl
    from torch import nn
    def build():
        return nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(6)))
    threading.stack_size(1 << 46)  # more than there is: the system gives no thread
    model = wl.load(build, sys.argv[1], dtype=torch.float64, workers=4)
    print(all(bool((layer.weight == i + 1).all()) for i, layer in enumerate(model)), threading.active_count())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how large a stack may be")
def test_a_system_that_gives_no_threads(tmp_path: Path):
    wl.save({f"{i}.weight": torch.full((1000, 1000), i + 1.0) for i in range(6)}, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FEW_THREADS), str(tmp_path)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "1"], done.stderr[-2000:]


def test_fewer_threads_than_wanted_do_all_the_work(monkeypatch: pytest.MonkeyPatch):
    done: list[tuple[int, str]] = []
    size = threading.stack_size()

    def execute(item: int) -> int:
        # The first worker is at work; from now on the system gives no thread.
        threading.stack_size(1 << 46)
        done.append((item, threading.current_thread().name))
        return 1

    try:
        for _ in range(20):
            done.clear()
            Pool(range(40), range(40, 80), execute, workers=8, reporter=Reporter(None, 80), cancel=None).run()
            assert sorted(item for item, _ in done) == list(range(80))
            threading.stack_size(size)
    finally:
        threading.stack_size(size)
