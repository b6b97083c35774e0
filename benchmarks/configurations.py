"""Every configuration of Transformers at its default, full size: does it build deferred, at what cost beside ``meta``?

Each configuration runs in a process of its own, forked from this one. Run ``python benchmarks/configurations.py``
(all), with names for some, ``--json`` for a line of JSON each. A configuration that does not build under
``torch.device("meta")`` is left out and named. Times are this thread's CPU seconds, the best of alternating rounds;
growth is the peak of resident memory above what the process held before the first deferred construction.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.utils import logging as transformers_logging

import weightlift as wl

LIMIT_RATIO = 3.0


def builder(name: str) -> Callable[[], nn.Module]:
    """Builds the base model of a model type with its default configuration."""
    config = CONFIG_MAPPING[name]()
    cls = MODEL_MAPPING[type(config)]
    if isinstance(cls, list | tuple):
        cls = cls[0]
    return lambda: cls(config)  # type: ignore[no-any-return]


def timed(build: Callable[[], object]) -> float:
    gc.collect()
    start = time.thread_time()
    build()
    return time.thread_time() - start


def on_meta(build: Callable[[], object]) -> object:
    with torch.device("meta"):
        return build()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One configuration, in this process."""
    result: dict[str, Any] = {"name": name}
    try:
        build = builder(name)
        on_meta(build)
    except Exception as error:
        return {**result, "not_on_meta": repr(error)[:200]}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes()
    try:
        handle = wl.defer(build)
        result.update(numel=handle.numel, growth_bytes=peak_bytes() - before)
        del handle
        pairs = [(timed(lambda: on_meta(build)), timed(lambda: wl.defer(build))) for _ in range(rounds)]
    except Exception as error:
        return {**result, "error": repr(error)[:300]}
    if pairs:
        result["meta_s"], result["defer_s"] = (min(times) for times in zip(*pairs))
    return result


def measured(names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """`measure`, each in a forked process: what one leaves behind is not seen by the next. What all of them import,
    and what torch does for its first operator on ``meta``, is there before."""
    importlib.import_module("transformers.modeling_utils")
    on_meta(lambda: nn.init.trunc_normal_(nn.Linear(2, 2).weight))
    for name in names:
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(readable)
            with os.fdopen(writable, "w") as out:
                json.dump(measure(name, rounds), out)
            os._exit(0)
        os.close(writable)
        with os.fdopen(readable) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        yield json.loads(text) if text else {"name": name, "error": "the process died"}


def summary(results: list[dict[str, Any]]) -> str:
    built = [r for r in results if "growth_bytes" in r and "error" not in r]
    failed = [f"{r['name']}: {r['error']}" for r in results if "error" in r]
    left_out = [r["name"] for r in results if "not_on_meta" in r]
    lines = [f"{len(built)} of {len(built) + len(failed)} that build on meta build deferred", *failed]
    if left_out:
        lines.append(f"do not build on meta: {', '.join(left_out)}")
    if built:
        largest = max(built, key=lambda r: r["numel"])
        growth = max(built, key=lambda r: r["growth_bytes"])
        lines.append(f"largest: {largest['name']}, {largest['numel']:,} parameters")
        lines.append(f"largest growth: {growth['name']}, {growth['growth_bytes'] / 1e6:.0f} MB")
    ratios = sorted((r["defer_s"] / r["meta_s"], r["name"]) for r in built if "meta_s" in r)
    if ratios:
        within = sum(ratio <= LIMIT_RATIO for ratio, _ in ratios) / len(ratios)
        lines.append(f"time / meta: median {statistics.median(r for r, _ in ratios):.2f}, {within:.1%} within 3×")
        lines.append("slowest: " + ", ".join(f"{name} {ratio:.1f}×" for ratio, name in ratios[-5:]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all when none is given")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds; 0: only build")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.getLogger("weightlift").setLevel(logging.ERROR)
    results = []
    for result in measured(arguments.names or list(CONFIG_MAPPING), arguments.rounds):
        results.append(result)
        print(json.dumps(result) if arguments.json else result, flush=True)
    print(summary(results), file=sys.stderr if arguments.json else sys.stdout)


if __name__ == "__main__":
    main()
