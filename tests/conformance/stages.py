"""What is done to one case, in a process of its own."""

from __future__ import annotations

import copy
import io
import os
import random
import re
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from .cases import Case, Script
from .compare import compare, sampled_paths
from .snapshot import Snapshot, bits, memory, readable, take

REFERENCES = 4
# Another number repeats the whole suite with other samples: for looking for false alarms.
OFFSET = 10007 * int(os.environ.get("WEIGHTLIFT_CONFORMANCE_SEED", "0"))
SEED = 123 + OFFSET


class Run:
    """One case; `say(kind, text)` receives ("stage", name), ("fail", message) and ("broken", message)."""

    def __init__(self, case: Case, say: Callable[[str, str], None], *, short: bool) -> None:
        self.case, self._say, self.short = case, say, short
        self.stage = ""

    def fail(self, message: str) -> None:
        self._say("fail", f"[{self.stage}] {message}")

    def step(self, name: str, action: Callable[[], Any]) -> Any:
        """Run one stage; an exception in it is a failure, and the others go on."""
        self.stage = name
        self._say("stage", name)
        try:
            return action()
        except Exception as error:
            self.fail(f"raised {_short(error)}")
            return None

    # -- building -------------------------------------------------------------------------------------------------

    def _prepare(self, seed: int) -> None:
        if self.case.reset:
            self.case.reset()
        torch.manual_seed(seed if seed == self.case.process_seed else seed + OFFSET)
        np.random.seed(7)
        random.seed(7)

    def ordinary(self, seed: int) -> nn.Module:
        self._prepare(seed)
        return self.case.build()

    def snap(self, module: nn.Module) -> Snapshot:
        return take(module, self.case.extra() if self.case.extra else None)

    def seeds(self) -> list[int]:
        seeds = [1000 + i for i in range(REFERENCES)]
        if self.case.process_seed is not None:
            seeds[0] = self.case.process_seed
        return seeds

    def compare(self, refs: list[Snapshot], module: nn.Module, *, fresh: bool) -> None:
        case = self.case
        got = self.snap(module)
        options = {k: getattr(case, k) for k in ("positional", "correlated", "undefined", "tolerance")}
        for problem in compare(refs, got, fresh=fresh, **options):
            self.fail(problem)

    # -- the whole ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.stage = "ordinary"
        self._say("stage", "ordinary construction (the case itself)")
        try:
            refs, modules = self._references()
        except Exception as error:
            self._say("broken", _short(error))
            return
        built = self.step("materialize", lambda: self._materialize(refs))
        if self.case.repeatable:
            self.step("repeat", self._repeat)
        if built is not None and not self.short:
            self.step("save", lambda: self._save(modules[0], built))
            self.step("deepcopy", lambda: self._deepcopy(modules[0], built))
        if self.case.loadable:
            self.step("load", self._load)
            if not self.short:
                self.step("load with defer=False", lambda: self._load(defer=False))
            if self.case.missing and not self.short:
                self.step("missing", self._missing)
        if built is not None:
            self.step("forward", lambda: self._forward(modules[0], built))

    def _references(self) -> tuple[list[Snapshot], list[nn.Module]]:
        refs, modules = [], []
        for seed in self.seeds():
            modules.append(self.ordinary(seed))
            refs.append(self.snap(modules[-1]))
            if self.case.check:
                self.case.check(modules[-1])
        varying = [p for p in sampled_paths(refs) if not any(p.startswith(u) for u in self.case.undefined)]
        if bool(varying) != (self.case.kind == "sampled"):
            raise AssertionError(f"declared {self.case.kind}, but these vary with the seed: {varying}")
        return refs, modules

    def _materialize(self, refs: list[Snapshot]) -> nn.Module:
        import weightlift as wl

        self._prepare(999 if self.case.process_seed is None else self.case.process_seed)
        before = torch.get_rng_state()
        handle = wl.defer(self.case.build)
        if isinstance(handle, nn.Module):
            self.fail("defer() returned a module, not a handle")
        module = handle.materialize()
        if self.case.leaves_rng and self.case.kind != "seeded" and not torch.equal(before, torch.get_rng_state()):
            self.fail("torch's global random generator was advanced")
        self.compare(refs, module, fresh=True)
        if self.case.check:
            self.step("materialize: relation", lambda: self.case.check(module))
        return module

    def _repeat(self) -> None:
        import weightlift as wl

        results = []
        for seed in (SEED, SEED, SEED + 1):
            self._prepare(555 + len(results))
            results.append(self.snap(wl.defer(self.case.build, seed=seed).materialize()))
        for path in _different(results[0], results[1], self.case.undefined):
            self.fail(f"{path}: two deferred constructions with the same seed differ")
        if self.case.kind == "sampled" and self.case.repeatable:
            changed = _different(results[0], results[2], self.case.undefined)
            if not changed:
                self.fail("two deferred constructions with different seeds are the same")

    # -- loading --------------------------------------------------------------------------------------------------

    def _donor(self) -> dict[str, torch.Tensor]:
        """A full state dict of values that no initialiser makes."""
        donor = self.ordinary(31)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for t in {**dict(donor.named_parameters()), **_persistent(donor)}.values():
                if t.is_quantized or t.layout != torch.strided or t.device.type != "cpu" or t.is_inference():
                    continue
                if t.dtype.is_complex or t.dtype.is_floating_point:
                    noise = torch.rand(t.shape, generator=generator) + 0.25
                    t.copy_(noise.to(t.dtype))
                elif t.dtype == torch.int64 and t.dim() == 0:
                    t.add_(3)
        with torch.no_grad():
            return {k: _clone(v) for k, v in donor.state_dict().items() if isinstance(v, torch.Tensor)}

    def _expected(self, state: dict[str, torch.Tensor], *, strict: bool) -> tuple[list[nn.Module], list[Snapshot]]:
        """Ordinary modules into which `load_state_dict` has loaded this."""
        modules, refs = [], []
        for seed in self.seeds():
            modules.append(self.ordinary(seed))
            modules[-1].load_state_dict(dict(state), strict=strict)
            refs.append(self.snap(modules[-1]))
        return modules, refs

    def _load(self, **options: Any) -> None:
        import weightlift as wl

        state = self._donor()
        ours = {k: _clone(v) for k, v in state.items()}
        modules, refs = self._expected(state, strict=True)
        self._prepare(999)
        module = wl.load(self.case.build, ours, strict=True, **options)
        self.compare(refs, module, fresh=False)
        with torch.no_grad():
            loaded = module.state_dict()
        for key, value in modules[0].state_dict().items():
            if isinstance(value, torch.Tensor) and not torch.equal(bits(value), bits(loaded[key])):
                self.fail(f"{key}: not the checkpoint's values")
        for key, value in state.items():
            if not torch.equal(bits(value), bits(ours[key])):
                self.fail(f"{key}: the caller's tensor was changed by load()")
        self.step("load: forward", lambda: self._forward(modules[0], module))

    def _missing(self) -> None:
        state = self._donor()
        groups = _targets(self.ordinary(31))
        groups = [g for g in groups if g and set(g) <= set(state)]
        if not groups:
            return
        everything = self._missing_load(state, set(state), workers=8)
        for workers in (1, 2):
            again = self._missing_load(state, set(state), workers=workers)
            for path in _different(everything, again, self.case.undefined):
                self.fail(f"{path}: initialised differently with workers={workers} than with workers=8")
        if self.case.repeatable:
            self._against_materialize(everything)
        for group in _some(groups):
            self._one_missing(state, set(group), everything, compared=True)
        half = {k for g in groups[::2] for k in g}
        self._one_missing(state, half, everything, compared=False)

    def _against_materialize(self, everything: Snapshot) -> None:
        import weightlift as wl

        self._prepare(77)
        snap = self.snap(wl.defer(self.case.build, seed=SEED).materialize())
        for path in _different(snap, everything, self.case.undefined):
            self.fail(f"{path}: materialize() and load() with everything missing differ, though the seed is the same")

    def _missing_load(self, state: dict[str, torch.Tensor], gone: set[str], *, workers: int) -> Snapshot:
        import weightlift as wl

        rest = {k: _clone(v) for k, v in state.items() if k not in gone}
        rest["not.in.the.model"] = torch.zeros(3)
        self._prepare(40 + workers)
        return self.snap(wl.load(self.case.build, rest, strict=False, seed=SEED, workers=workers))

    def _one_missing(
        self, state: dict[str, torch.Tensor], gone: set[str], everything: Snapshot, *, compared: bool
    ) -> None:
        snap = self._missing_load(state, gone, workers=2)
        for path in sorted(gone & set(snap.held) & set(everything.held)):
            if any(path.startswith(u) for u in self.case.undefined):
                continue
            if not torch.equal(bits(snap.held[path].tensor), bits(everything.held[path].tensor)):
                self.fail(f"{path}: its initialisation depends on which other keys were missing (here {sorted(gone)})")
        if compared:
            rest = {k: v for k, v in state.items() if k not in gone}
            _, refs = self._expected(rest, strict=False)
            options = {k: getattr(self.case, k) for k in ("positional", "correlated", "undefined", "tolerance")}
            for problem in compare(refs, snap, fresh=False, **options):
                self.fail(f"without {sorted(gone)}: {problem}")

    # -- using ----------------------------------------------------------------------------------------------------

    def _forward(self, reference: nn.Module, module: nn.Module) -> None:
        if self.case.inputs is None:
            return
        outputs = []
        for one in (reference, module):
            one.eval()
            torch.manual_seed(3)
            given = self.case.inputs()
            out = one(**given) if isinstance(given, dict) else one(*given)
            total = _total(out)
            if total.requires_grad:
                total.backward()
            outputs.append((total.detach(), {n for n, p in one.named_parameters() if p.grad is not None}))
        if torch.isfinite(outputs[0][0]) and not torch.isfinite(outputs[1][0]):
            self.fail("the forward gives values that are not finite")
        if outputs[0][1] != outputs[1][1]:
            self.fail(f"gradients: ordinary for {sorted(outputs[0][1])}, got for {sorted(outputs[1][1])}")
        same = all(torch.equal(bits(a), bits(b)) for a, b in zip(*map(_tensors, (reference, module)), strict=True))
        if same and not torch.allclose(outputs[0][0], outputs[1][0], rtol=1e-3, atol=1e-3, equal_nan=True):
            self.fail(f"same weights, other forward: ordinary {outputs[0][0]}, got {outputs[1][0]}")

    def _save(self, reference: nn.Module, module: nn.Module) -> None:
        sizes = []
        for one in (reference, module):
            file = io.BytesIO()
            torch.save(one.state_dict(), file)
            sizes.append(file.tell())
            file.seek(0)
            back = torch.load(file, weights_only=False)
        if sizes[1] > sizes[0] + 4096:
            self.fail(f"torch.save of the state dict takes {sizes[1]} bytes, ordinarily {sizes[0]}")
        for key, value in module.state_dict().items():
            if isinstance(value, torch.Tensor) and not torch.equal(bits(value), bits(back[key])):
                self.fail(f"{key}: torch.save and torch.load change it")

    def _deepcopy(self, reference: nn.Module, module: nn.Module) -> None:
        try:
            copy.deepcopy(reference)
        except Exception:
            return  # ordinary modules of this kind cannot be copied either
        for path in _different(take(copy.deepcopy(module)), take(module), self.case.undefined):
            self.fail(f"{path}: copy.deepcopy of the module changes it")


def run_script(script: Script, say: Callable[[str, str], None]) -> None:
    say("stage", "script")
    try:
        script.run()
    except Exception as error:
        say("fail", _short(error))


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _persistent(module: nn.Module) -> dict[str, torch.Tensor]:
    keys = set(module.state_dict().keys())
    return {k: b for k, b in module.named_buffers() if k in keys}


def _clone(t: torch.Tensor) -> torch.Tensor:
    return t.detach().clone()


def _targets(module: nn.Module) -> list[list[str]]:
    """The state dict's keys, grouped by memory: one group is missing only when all of its names are."""
    groups: dict[Any, list[str]] = {}
    for key, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            span = memory(value)
            groups.setdefault(key if span is None else span, []).append(key)
    return list(groups.values())


def _some(groups: list[list[str]]) -> list[list[str]]:
    picked = [groups[0], groups[len(groups) // 2], groups[-1]]
    return [g for i, g in enumerate(picked) if g not in picked[:i]]


def _different(a: Snapshot, b: Snapshot, undefined: tuple[str, ...]) -> list[str]:
    result = []
    for path in sorted(set(a.held) & set(b.held)):
        one, other = a.held[path].tensor, b.held[path].tensor
        if any(path.startswith(u) for u in undefined) or not (readable(one) and readable(other)):
            continue
        if one.shape != other.shape or not torch.equal(bits(one), bits(other)):
            result.append(path)
    return result


def _total(out: Any) -> torch.Tensor:
    """The sum of all floating-point tensors in a forward's result."""
    total = torch.zeros(())
    if isinstance(out, torch.Tensor):
        if out.is_complex():
            out = torch.view_as_real(out)
        return out.float().sum() if out.is_floating_point() else total
    if isinstance(out, dict):
        out = list(out.values())
    if isinstance(out, list | tuple):
        for inner in out:
            total = total + _total(inner)
    return total


def _short(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{re.sub('.*/(site-packages|src|tests)/', '', f.filename)}:{f.lineno} {f.name}" for f in frames]
    shown = lines if len(lines) <= 14 else [*lines[:3], "...", *lines[-10:]]
    text = f"{type(error).__name__}: {error}"
    return text[:1500] + "\n      at " + "\n      at ".join(shown)


def quiet() -> None:
    """Cases are full of deprecated calls, on purpose."""
    warnings.simplefilter("ignore")
