"""Children of a process that has set torch's number of threads and used them load on several threads at once. Run by
test_forked_children.py: ``python -m tests.concurrency.forked_children CHILDREN``; prints how each way ended as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import weightlift as wl


class Layers(nn.Module):
    """Tensors that are large enough for torch to ask for its threads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(400, 400, bias=False) for _ in range(4))


class Computing(nn.Module):
    """A constructor that computes: deferring has to run this at once."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = float(torch.arange(200_000).sum())


def _workers(state: dict[str, torch.Tensor]) -> None:
    model = wl.load(Layers, state, dtype=torch.bfloat16, workers=4)
    assert all(bool(p.eq(state[n].to(torch.bfloat16)).all()) for n, p in model.named_parameters())


def _together(work: Callable[[], object], count: int = 4) -> None:
    """In threads of their own: the forking thread's OpenMP team is gone in a child, and libgomp waits for it."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def thread() -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=thread) for _ in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if errors:
        raise errors[0]


def _ends_well(work: Callable[[], object]) -> bool:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(repr(error)[:300], file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def main() -> None:
    children = int(sys.argv[1])
    torch.set_num_threads(64)  # the larger the pool, the longer is it missing
    state = {name: torch.rand(400, 400) for name, _ in Layers().named_parameters()}
    torch.ones(200_000)  # this thread has asked now; torch's own repair passes it by
    load = partial(wl.load, Layers, state, dtype=torch.bfloat16, workers=1)
    ways: dict[str, Callable[[], object]] = {
        "workers": partial(_together, partial(_workers, state), 1),
        "loads": partial(_together, load),
        "constructors": partial(_together, partial(wl.defer, Computing)),
    }
    print(json.dumps({name: sum(_ends_well(way) for _ in range(children)) for name, way in ways.items()}))


if __name__ == "__main__":
    main()
