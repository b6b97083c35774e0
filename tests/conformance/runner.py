"""The child process of the suite: imports torch and weightlift once, then forks for every case.

    python -m conformance.runner [--short] [--jobs 2] [--only PATTERN] [--names-from FILE] --out REPORT.json

A fork taken before any tensor work is as good as a fresh process (one intra-op thread, no autograd threads yet).
`WEIGHTLIFT_GUARD_RESERVATIONS=1` must be in the environment for reservations to be inaccessible. With `--short`, the
cases of one theme share one fork, and the slow stages are left out.
"""

from __future__ import annotations

import argparse
import faulthandler
import fnmatch
import json
import os
import selectors
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch

from . import cases, stages

LIMIT_S = 120


@dataclass
class Child:
    pid: int
    pipe: int
    errors: Any
    names: list[str]
    started: float
    text: bytes = b""
    report: dict[str, dict[str, Any]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="*")
    parser.add_argument("--names-from")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages.quiet()
    known = cases.everything()
    names = [n for n in known if fnmatch.fnmatch(n, options.only)]
    if options.names_from:
        with open(options.names_from) as f:
            wanted = set(f.read().split())
        names = [n for n in names if n in wanted]
    report: dict[str, dict[str, Any]] = {}
    trouble = _import()
    if trouble:
        report = {n: {"failures": [f"import weightlift: {trouble}"]} for n in names}
    else:
        if any(known[n].theme == "transformers" for n in names):
            from . import cases_transformers

            cases_transformers.preload()
        report = _all(_batches(names, known, options.short), known, options.jobs, options.short)
    with open(options.out, "w") as f:
        json.dump(report, f, indent=1)


def _import() -> str:
    try:
        import weightlift

        weightlift.defer, weightlift.load
    except Exception:
        return traceback.format_exc(limit=-3)
    return ""


def _batches(names: list[str], known: dict[str, Any], short: bool) -> list[list[str]]:
    guarded = os.environ.get("WEIGHTLIFT_GUARD_RESERVATIONS") == "1"
    names = [n for n in names if guarded or not getattr(known[n], "guarded_only", False)]
    if not short:
        return [[n] for n in names]
    themes: dict[str, list[str]] = {}
    for name in names:
        key = name if isinstance(known[name], cases.Script) else known[name].theme
        themes.setdefault(key, []).append(name)
    return list(themes.values())


def _all(batches: list[list[str]], known: dict[str, Any], jobs: int, short: bool) -> dict[str, dict[str, Any]]:
    report: dict[str, dict[str, Any]] = {}
    selector = selectors.DefaultSelector()
    waiting = batches[::-1]
    while waiting or selector.get_map():
        while waiting and len(selector.get_map()) < jobs:
            child = _start(waiting.pop(), known, short)
            selector.register(child.pipe, selectors.EVENT_READ, child)
        for key, _ in selector.select(timeout=1.0):
            child = key.data
            data = os.read(child.pipe, 1 << 16)
            child.text += data
            if not data:
                selector.unregister(child.pipe)
                report.update(_finish(child, ""))
                rest = [n for n in child.names if n not in report]
                if rest:  # a crash in a shared fork: the cases after it get a fork of their own
                    waiting.append(rest)
        for key in list(selector.get_map().values()):
            child = key.data
            if time.monotonic() - child.started > LIMIT_S * len(child.names) ** 0.5:
                os.kill(child.pid, signal.SIGKILL)
                selector.unregister(child.pipe)
                report.update(_finish(child, f"did not end within {LIMIT_S} s"))
                rest = [n for n in child.names if n not in report]
                if rest:
                    waiting.append(rest)
    return report


def _start(names: list[str], known: dict[str, Any], short: bool) -> Child:
    read, write = os.pipe()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        return Child(pid, read, errors, names, time.monotonic())
    try:
        os.close(read)
        os.dup2(errors.fileno(), 2)
        os.dup2(errors.fileno(), 1)
        faulthandler.enable(2)

        for name in names:

            def say(kind: str, text: str, name: str = name) -> None:
                os.write(write, json.dumps([name, kind, text]).encode() + b"\n")

            begun = time.monotonic()
            one = known[name]
            if isinstance(one, cases.Script):
                stages.run_script(one, say)
            else:
                stages.Run(one, say, short=short).run()
            say("done", f"{time.monotonic() - begun:.2f}")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
    os._exit(0)


def _finish(child: Child, killed: str) -> dict[str, dict[str, Any]]:
    os.close(child.pipe)
    _, status = os.waitpid(child.pid, 0)
    reports: dict[str, dict[str, Any]] = {}
    for line in child.text.splitlines():
        try:
            name, kind, text = json.loads(line)
        except ValueError:  # the last line of a process that was killed
            continue
        one = reports.setdefault(name, {"failures": [], "stage": "", "done": False})
        if kind == "stage":
            one["stage"] = text
        elif kind == "fail":
            one["failures"].append(text)
        elif kind == "broken":
            one["failures"].append(f"THE CASE ITSELF IS BROKEN (ordinary construction): {text}")
        else:
            one["done"], one["seconds"] = True, float(text)
    if not reports:
        reports[child.names[0]] = {"failures": [], "stage": "start", "done": False}
    for one in reports.values():
        if not one["done"]:
            one["failures"].append(_end(one["stage"], status, killed) + _tail(child.errors))
    child.errors.close()
    return reports


def _end(stage: str, status: int, killed: str) -> str:
    if killed:
        return f"[{stage}] {killed}\n"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hint = " (a read of a reservation that nothing had replayed or filled?)" if number == signal.SIGSEGV else ""
        return f"[{stage}] the process was killed by {signal.Signals(number).name}{hint}\n"
    return f"[{stage}] the process ended with exit status {os.waitstatus_to_exitcode(status)}\n"


def _tail(errors: Any) -> str:
    errors.seek(0)
    text = errors.read().decode(errors="replace")
    at = text.find("Fatal Python error")
    return text[at : at + 2500] if at >= 0 else text[-2500:]


if __name__ == "__main__":
    main()
