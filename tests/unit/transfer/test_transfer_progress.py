"""Progress: monotonic, from one thread, complete; a callable that raises stops the load."""

import io
import sys
import threading

import pytest
import torch
from transfer_helpers import load

from weightlift.transfer.jobs import Task


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("copy", [False, True])
def test_a_callable_is_told(saved, workers, copy):
    calls, threads = [], set()

    def tell(done, total):
        calls.append((done, total))
        threads.add(threading.get_ident())

    saved.load(progress=tell, workers=workers, copy=copy, tasks=[Task("t", 1000, lambda: None)])
    total = sum(t.nbytes for t in saved.tensors.values()) + 1000
    assert {t for _, t in calls} == {total}
    done = [d for d, _ in calls]
    assert done == sorted(set(done)) and done[-1] == total
    assert threads == {threading.get_ident()}
    assert len(calls) <= 102


def test_nothing_to_load_is_told_too():
    calls = []
    load([], progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (0, 0)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_callable_that_raises_stops_the_load(saved, workers):
    class StopError(Exception):
        pass

    def tell(done, total):
        raise StopError

    with pytest.raises(StopError):
        saved.load(saved.jobs(torch.float16), progress=tell, workers=workers)


def test_the_bar(saved, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    saved.load(progress=True, copy=True)
    assert "100%" in stream.getvalue()
    stream.truncate(0)
    saved.load(progress=None, copy=True)
    saved.load(progress=False, copy=True)
    assert not stream.getvalue().strip("\0")
