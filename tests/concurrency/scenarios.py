"""One load of any kind, and whether its outcome is right: what the randomised schedules are made of."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import weightlift as wl

KINDS = ("tied", "missing", "nested", "existing", "legacy pickle", "sharded", "mapping", "cast", "checked")
ENDINGS = ("done", "done", "done", "done", "cancelled", "refused", "damaged", "constructor fails")
WAYS = ("call", "call", "call", "plan", "defer", "to_thread", "fork")
DTYPES = (None, torch.bfloat16, torch.float64)


class Tied(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 64, bias=False)
        self.register_buffer("inv_freq", 1.0 / (100 ** (torch.arange(0, 8).float() / 8)), persistent=False)
        nn.init.trunc_normal_(self.layers[0].weight, std=0.02)
        nn.init.orthogonal_(self.layers[1].weight)
        self.head.weight = self.embedding.weight


class Missing(Tied):
    """Has a layer that no checkpoint provides: its values depend on the seed and its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(24, 24)


@dataclass(frozen=True)
class Files:
    """What is loaded: several formats of one state."""

    folder: Path
    state: dict[str, torch.Tensor]
    extra: dict[str, torch.Tensor]

    @property
    def single(self) -> Path:
        return self.folder / "model.safetensors"


def prepare(folder: Path) -> Files:
    """Write the checkpoints."""
    torch.manual_seed(1)
    state = {name: value.clone() for name, value in Tied().state_dict().items() if name != "head.weight"}
    wl.save(state, folder, manifest=True)
    wl.save(state, folder / "sharded", max_shard_bytes=5000)
    torch.save(state, folder / "model.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "damaged.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    save_file({**state, "unknown": torch.ones(1)}, folder / "refused.safetensors")
    extra = wl.load(Missing, state, strict=False, seed=7).extra.state_dict()
    return Files(folder, state, {name: value.clone() for name, value in extra.items()})


@dataclass(frozen=True)
class Scenario:
    """What to load, how, and how it ends."""

    kind: str
    ending: str
    way: str
    workers: int
    copy: bool
    dtype: torch.dtype | None
    cancel_at: int


def run(scenario: Scenario, files: Files) -> list[str]:
    """Carry it out; what was wrong (nothing, one hopes)."""
    if scenario.way == "fork" and hasattr(os, "fork") and sys.version_info < (3, 15):
        return _forked(scenario, files)
    if scenario.way == "to_thread":
        return asyncio.run(_in_loop(scenario, files))
    return _one(scenario, files)


async def _in_loop(scenario: Scenario, files: Files) -> list[str]:
    found = await asyncio.gather(*(asyncio.to_thread(_one, scenario, files) for _ in range(2)))
    return [fault for faults in found for fault in faults]


def _forked(scenario: Scenario, files: Files) -> list[str]:
    """A child that is forked while other threads load must be able to load.

    Not into a module that it builds ordinarily: torch's OpenMP (libgomp) may hang in a child whose parent has used it,
    whoever asks, and an ordinary ``orthogonal_`` does.
    """
    if scenario.kind == "existing":
        scenario = replace(scenario, kind="tied")
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            signal.alarm(100)  # not faulthandler, whose watchdog of the parent a child waits for in vain
            faults = _one(scenario, files)
            print(faults, file=sys.stderr) if faults else None
            code = 1 if faults else 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return [] if status == 0 else [f"the child ended with {status}"]


class _Cancel:
    """An event that is set at the n-th look, whichever thread looks."""

    def __init__(self, at: int) -> None:
        self._left = at
        self._lock = threading.Lock()

    def is_set(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left < 0


class _Refuses(Exception):
    pass


def _one(scenario: Scenario, files: Files) -> list[str]:
    expected: tuple[type[BaseException], ...] = {
        "cancelled": (wl.LoadCancelled,),
        "refused": (wl.PlanError,),
        "damaged": (wl.CheckpointError,),
        "constructor fails": (_Refuses,),
    }.get(scenario.ending, ())
    try:
        model = _load(scenario, files)
    except expected:
        return []
    except Exception as error:
        return [f"{scenario}: {error!r:.300}"]
    if scenario.ending not in ("done", "cancelled"):  # what ends before the n-th look is not cancelled
        return [f"{scenario}: no error"]
    return [f"{scenario}: {fault}" for fault in _faults(model, scenario, files)]


def _load(scenario: Scenario, files: Files) -> nn.Module:
    source, build = _source_and_module(scenario, files)
    options: dict[str, Any] = {"workers": scenario.workers, "copy": scenario.copy, "dtype": scenario.dtype, "seed": 7}
    options["verify"] = scenario.kind == "checked" and scenario.ending == "done"
    options["strict"] = scenario.kind != "missing" or scenario.ending == "refused"
    if scenario.ending == "cancelled":
        options["cancel"] = _Cancel(scenario.cancel_at)
    if scenario.way == "plan":
        made = wl.plan(build, source, **options)
        str(made)
        return made.execute()
    if scenario.way == "defer" and not isinstance(build, nn.Module):
        return wl.defer(build, seed=7).load(source, **options)
    return wl.load(build, source, **options)


def _source_and_module(scenario: Scenario, files: Files) -> tuple[Any, Any]:
    source: Any = {
        "legacy pickle": files.folder / "legacy.pt",
        "sharded": files.folder / "sharded",
        "mapping": dict(files.state),
        "cast": files.folder / "model.pt",
    }.get(scenario.kind, files.single)
    if scenario.ending in ("damaged", "refused"):
        source = files.folder / f"{scenario.ending}.safetensors"
    if scenario.ending == "constructor fails":

        def refuse() -> nn.Module:
            Tied()
            raise _Refuses

        return source, refuse
    if scenario.kind == "nested":

        def outer() -> nn.Module:
            inner = wl.load(Tied, files.single, workers=scenario.workers)
            return nn.Module() if _faults_of(inner, files) else Tied()

        return source, outer
    if scenario.kind == "existing":
        return source, Tied()
    return source, Missing if scenario.kind == "missing" else Tied


def _faults(model: nn.Module, scenario: Scenario, files: Files) -> list[str]:
    found = _faults_of(model, files, scenario.dtype)
    if scenario.kind == "missing":
        for name, value in files.extra.items():
            if not torch.equal(model.extra.state_dict()[name], value.to(scenario.dtype or value.dtype)):
                found.append(f"extra.{name}: other initial values")
    return found


def _faults_of(model: nn.Module, files: Files, dtype: torch.dtype | None = None) -> list[str]:
    if not isinstance(model, Tied):
        return ["the nested load was wrong"]
    found = []
    if model.head.weight is not model.embedding.weight:
        found.append("untied")
    inv_freq = 1.0 / (100 ** (torch.arange(0, 8).float() / 8))
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        right = inv_freq if name == "inv_freq" else files.state.get(name)
        if right is not None and (value.is_meta or not torch.equal(value, right.to(dtype or right.dtype))):
            found.append(f"{name}: wrong ({value.device}, {value.dtype})")
    return found
