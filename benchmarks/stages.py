"""Where the time of a mapped load goes: processor milliseconds of each stage, best and median, in this process.

    python -m benchmarks.stages [--narrow] [--millions 1236] [--rounds 12]

A Llama by hand, or many narrow layers of torch's own (`benchmarks.ordinary_module`), from a warm file, and what no
loader can be without: building its modules with no initialiser (torch's functions are replaced for that, in this
process alone), and reading one element of every page.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import weightlift as wl
from benchmarks import ordinary_module
from benchmarks.harness import touch


@contextmanager
def no_initialisers() -> Iterator[None]:
    """Modules that are built meanwhile, on ``meta``, get no values."""
    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    nothing = {name: lambda *args, **_: args[0] if args else None for name in names}
    with mock.patch.multiple(nn.init, **nothing), mock.patch.multiple(
        nn.modules.activation, constant_=nothing["constant_"], xavier_uniform_=nothing["xavier_uniform_"],
        xavier_normal_=nothing["xavier_normal_"],
    ), torch.device("meta"):  # fmt: skip
        yield


def milliseconds(call: Callable[[], object], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        gc.collect()
        start = time.process_time()
        result = call()
        found.append(1e3 * (time.process_time() - start))
        del result
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=1236, help="of parameters")
    parser.add_argument("--narrow", action="store_true", help="many narrow layers")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cls = ordinary_module.Narrow if arguments.narrow else ordinary_module.Llama
        ordinary_module.prepare(Path(folder), arguments.millions / 1236, cls=cls)
        build = partial(cls, torch.load(Path(folder, "millions.pt")))
        path = Path(folder, "model.safetensors")

        def on_meta() -> nn.Module:
            with torch.device("meta"):
                return build()

        def bare() -> nn.Module:
            with no_initialisers():
                return build()

        model = wl.load(build, path, progress=False)
        print(f"{sum(1 for _ in model.parameters()):,} tensors; processor milliseconds, best and median")
        stages: dict[str, Callable[[], object]] = {
            "the modules, on meta, no initialiser": bare,
            "the modules, on meta": on_meta,
            "deferred construction": lambda: wl.defer(build),
            "deferred construction and plan": lambda: wl.plan(build, path),
            "load": lambda: wl.load(build, path, progress=False),
            "one element of every page, mapped before": partial(touch, model),
        }
        for name, call in stages.items():
            found = milliseconds(call, arguments.rounds)
            print(f"  {name:42} {min(found):7.1f} {statistics.median(found):7.1f}")


if __name__ == "__main__":
    main()
