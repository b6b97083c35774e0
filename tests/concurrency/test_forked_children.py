"""Loads in forked children find torch's threads in order, and wait for no thread of their parents'."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.children import in_child

from weightlift import locks
from weightlift.integrations.transformers import classes, dtypes
from weightlift.locks import LOADING

ROOT = Path(__file__).resolve().parents[2]
CHILDREN = 20
LONG_SECONDS = 60

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_children_load_on_several_threads() -> None:
    command = [sys.executable, "-m", "tests.concurrency.forked_children", str(CHILDREN)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert ended == {"workers": CHILDREN, "loads": CHILDREN, "constructors": CHILDREN}, done.stderr[-3000:]


@contextlib.contextmanager
def held_elsewhere(*holds: Callable[[], Any]) -> Iterator[None]:
    """Each is held by a thread of its own within, or is being waited for."""
    over = threading.Event()
    threads = []

    def hold(entering: Callable[[], Any]) -> None:
        with entering():
            over.wait(LONG_SECONDS)

    try:
        for entering in holds:
            waiting = len(LOADING._queue) + len(LOADING._readers) + (LOADING._writer is not None)
            threads.append(threading.Thread(target=hold, args=[entering], daemon=True))
            threads[-1].start()
            while len(LOADING._queue) + len(LOADING._readers) + (LOADING._writer is not None) == waiting:
                over.wait(0.001)
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(LONG_SECONDS)


def load_both_ways() -> None:
    with LOADING.shared():
        pass
    with LOADING.alone(), LOADING.shared():
        pass


@pytest.mark.parametrize("holds", [[LOADING.shared], [LOADING.shared, LOADING.alone]], ids=["a load", "two loads"])
def test_a_child_that_is_forked_during_loads_can_load(holds: list[Callable[[], Any]]) -> None:
    with held_elsewhere(*holds):
        assert in_child(load_both_ways) == 0
    load_both_ways()


@pytest.mark.parametrize("how", [LOADING.shared, LOADING.alone])
def test_a_child_that_is_forked_while_functions_are_replaced_is_told(how: Callable[[], Any]) -> None:
    """It would wait for ever, or take what is replaced for what is right."""

    def refused() -> None:
        with pytest.raises(RuntimeError, match="forked while another thread loaded"), how():
            pass

    with held_elsewhere(LOADING.alone):
        assert in_child(refused) == 0
    load_both_ways()


def test_a_load_that_forks_goes_on_in_both() -> None:
    with LOADING.alone():
        assert in_child(load_both_ways) == 0
    with LOADING.shared():
        assert in_child(load_both_ways) == 0
    load_both_ways()


@pytest.mark.parametrize("lock", [classes._PARSING, dtypes._lock])
def test_locks_are_free_in_a_child(lock: locks.Lock) -> None:
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.own:
            taken.set()
            over.wait(LONG_SECONDS)

    def take() -> None:
        with lock.own:
            pass

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(LONG_SECONDS)
    try:
        assert in_child(take) == 0
    finally:
        over.set()
        thread.join(LONG_SECONDS)
