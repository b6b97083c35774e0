"""The registry of cases: small constructors, each a trap or an initialiser, and what holds for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

THEMES = ("init", "views", "values", "reads", "layers", "rng", "alias", "dtypes", "flow", "models", "transformers")
SCRIPTS = ("lazy", "scripts")


@dataclass(frozen=True)
class Case:
    """One constructor.

    `kind`: "sampled" (some values are), "exact" (none is), "seeded" (the constructor seeds itself, so none varies).
    `inputs`: arguments of a forward. `check`: raises unless its relation holds; run on ordinary modules too.
    `extra`: tensors held outside the module. `reset`: undoes the case's own global state before each construction.
    `positional`: elements which never vary are constants (off for discrete or clamped samples).
    `correlated`: the elements of one tensor depend on each other (a sum of samples, a common factor).
    `missing`: any of its keys may be missing from the checkpoint. `repeatable`: the seed decides all values.
    `leaves_rng`: torch's global generator must be as before. `undefined`: paths that no one gave values.
    `process_seed`: the process is seeded with this before deferred construction, and for one ordinary module.
    """

    name: str
    build: Callable[[], nn.Module]
    theme: str
    kind: Literal["sampled", "exact", "seeded"] = "sampled"
    inputs: Callable[[], Any] | None = None
    check: Callable[[Any], None] | None = None
    extra: Callable[[], dict[str, Any]] | None = None
    reset: Callable[[], None] | None = None
    positional: bool = True
    correlated: bool = False
    loadable: bool = True
    missing: bool = True
    repeatable: bool = True
    leaves_rng: bool = True
    undefined: tuple[str, ...] = ()
    process_seed: int | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Script:
    """A check that is not a comparison of two modules: runs in a process of its own, raises when it does not hold."""

    name: str
    run: Callable[[], None]
    theme: str
    guarded_only: bool = False


CASES: dict[str, Case] = {}
LATER: dict[str, Script] = {}


def case(**options: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register the decorated constructor as a case, named after it and its file."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        add(build.__name__, build, build.__module__, **options)
        return build

    return register


def add(name: str, build: Callable[[], nn.Module], module: str, **options: Any) -> None:
    theme = module.rsplit("cases_", 1)[-1]
    full = f"{theme}-{name}"
    assert full not in CASES, full
    CASES[full] = Case(full, build, theme, **options)


def script(**options: Any) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(run: Callable[[], None]) -> Callable[[], None]:
        theme = run.__module__.rsplit("cases_", 1)[-1]
        full = f"{theme}-{run.__name__}"
        assert full not in LATER, full
        LATER[full] = Script(full, run, theme, **options)
        return run

    return register


def everything() -> dict[str, Case | Script]:
    """All cases and scripts by name."""
    for theme in (*THEMES, *SCRIPTS):
        importlib.import_module(f"{__package__}.cases_{theme}")
    return {**CASES, **LATER}


class Bag(nn.Module):
    """A module of the given things: Parameters, buffers (plain tensors), sub-modules and anything else."""

    def __init__(self, **things: Any) -> None:
        super().__init__()
        for name, thing in things.items():
            if isinstance(thing, torch.Tensor) and not isinstance(thing, nn.Parameter):
                self.register_buffer(name, thing)
            else:
                setattr(self, name, thing)


def weight(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape or (64, 64), **options))


def equal(a: Any, b: Any, what: str) -> None:
    """Fail unless two tensors are bit-equal."""
    if not torch.equal(a.detach(), b.detach()):
        raise AssertionError(f"{what}: do not agree, largest difference {float((a - b).abs().max()):.4g}")


def near(a: Any, b: Any, what: str, tolerance: float = 1e-4) -> None:
    b = torch.as_tensor(b, dtype=a.dtype)
    if not torch.allclose(a.detach(), b.detach(), rtol=tolerance, atol=tolerance):
        raise AssertionError(f"{what}: not close, largest difference {float((a - b).abs().max()):.4g}")


def holds(condition: Any, what: str) -> None:
    if not bool(condition):
        raise AssertionError(what)


def bounded(t: Any, low: float, high: float) -> None:
    if float(t.detach().min()) < low or float(t.detach().max()) > high:
        raise AssertionError(f"outside [{low}, {high}]: min {float(t.min()):.4g}, max {float(t.max()):.4g}")
