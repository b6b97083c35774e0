"""Compare a module with ordinary ones: exactly where they agree among themselves, in distribution where they differ.

Several ordinary modules are built with different seeds. An element that has the same bits in all of them is not
sampled (or the constructor seeds): it must have those bits. The other elements are sampled, and must follow the
distribution that the ordinary ones have, as a whole and in every eighth of the tensor.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from .snapshot import Snapshot, bits, facts, numbers, readable

FEW = 24  # fewer varying elements than this are checked for their range only
KS = 3.4  # Kolmogorov-Smirnov constant: a false alarm in about 5e9 comparisons
MOST = 40_000


def compare(
    refs: list[Snapshot],
    got: Snapshot,
    *,
    fresh: bool = True,
    positional: bool = True,
    correlated: bool = False,
    undefined: tuple[str, ...] = (),
    tolerance: float = 0.0,
) -> list[str]:
    """The differences, one sentence each; empty when there are none.

    `positional=False`: elements that agree in every reference by chance (drop-out masks, integers) are not constants.
    `correlated`: the elements of one tensor depend on each other, one tensor says little about the distribution.
    `undefined`: paths whose values nobody defined (`torch.empty`).
    """
    problems = _structure(refs[0], got, fresh=fresh)
    for path, item in got.held.items():
        if path not in refs[0].held or any(path.startswith(u) for u in undefined):
            continue
        theirs = [r.held[path].tensor for r in refs]
        if item.tensor.shape != theirs[0].shape or item.tensor.dtype != theirs[0].dtype:
            continue  # said already
        if not readable(item.tensor) or not readable(theirs[0]):
            continue
        problems += _values(path, theirs, item.tensor, positional, correlated, tolerance)
    problems += _scalars(refs, got, undefined, tolerance)
    problems += _equalities(refs, got)
    return problems


def sampled_paths(refs: list[Snapshot]) -> list[str]:
    """Paths whose values differ among ordinary constructions."""
    result = []
    for path, item in refs[0].held.items():
        if readable(item.tensor) and item.tensor.numel():
            first = bits(item.tensor)
            if any(not torch.equal(first, bits(r.held[path].tensor)) for r in refs[1:]):
                result.append(path)
    return result


def _structure(ref: Snapshot, got: Snapshot, *, fresh: bool) -> list[str]:
    problems = []
    problems += _sets("tensors", set(ref.held), set(got.held))
    problems += _sets("modules", set(ref.modules), set(got.modules))
    problems += _sets("plain attributes", set(ref.scalars), set(got.scalars))
    if ref.keys != got.keys:
        problems.append(f"state_dict keys (or their order): ordinary {ref.keys}, got {got.keys}")
    for name, mine in got.modules.items():
        for what, value in mine.items():
            theirs = ref.modules.get(name, mine)[what]
            if theirs != value:
                problems.append(f"module {name}: {what}: ordinary {theirs}, got {value}")
    for path, item in got.held.items():
        other = ref.held.get(path)
        if other is None:
            continue
        if other.kind != item.kind:
            problems.append(f"{path}: ordinary is a {other.kind}, got a {item.kind}")
        theirs = facts(other.tensor, fresh=fresh)
        for what, value in facts(item.tensor, fresh=fresh).items():
            if theirs[what] != value:
                problems.append(f"{path}: {what}: ordinary {theirs[what]}, got {value}")
    problems += _groups("the same object under several names", ref.ties(), got.ties())
    problems += _groups("different tensors in one memory (path, byte offset)", ref.shared_memory(), got.shared_memory())
    return problems


def _sets(what: str, ref: set[str], got: set[str]) -> list[str]:
    problems = []
    if ref - got:
        problems.append(f"{what} of the ordinary module that are not there: {sorted(ref - got)}")
    if got - ref:
        problems.append(f"{what} that the ordinary module does not have: {sorted(got - ref)}")
    return problems


def _groups(what: str, ref: set[Any], got: set[Any]) -> list[str]:
    problems = [f"{what}: ordinary has {g}, which is not so here" for g in sorted(ref - got)]
    return problems + [f"{what}: got {g}, which is not so ordinarily" for g in sorted(got - ref)]


def _values(
    path: str, refs: list[torch.Tensor], got: torch.Tensor, positional: bool, correlated: bool, tolerance: float
) -> list[str]:
    if got.numel() == 0:
        return []
    mine, theirs = bits(got), [bits(r) for r in refs]
    same = torch.ones(len(mine), dtype=torch.bool)
    for other in theirs[1:]:
        same &= (other == theirs[0]).all(1)
    if not positional and not same.all():
        same[:] = False
    problems = []
    wrong = same & (mine != theirs[0]).any(1)
    if not same.all() and wrong.any():  # zeros that take their sign from a sample
        zeros = (numbers(got) == 0) & (numbers(refs[0]) == 0)
        wrong &= ~zeros.reshape(len(wrong), -1).all(1)
    if tolerance and wrong.any():
        near = torch.isclose(numbers(got), numbers(refs[0]), rtol=tolerance, atol=tolerance)
        wrong &= ~near.reshape(len(wrong), -1).all(1)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), got.shape)) if got.dim() else ()
        value, expected = numbers(got), numbers(refs[0])
        step = len(value) // len(mine)
        problems.append(
            f"{path}: {int(wrong.sum())} of the {int(same.sum())} elements that never vary in ordinary construction"
            f" differ (shape {tuple(got.shape)}); first at {where}:"
            f" ordinary {expected[at * step : at * step + step].tolist()},"
            f" got {value[at * step : at * step + step].tolist()}; ordinary overall {_brief(expected)},"
            f" got overall {_brief(value)}"
        )
    if not same.all():
        step = 2 if got.is_complex() else 1
        varying = (~same).repeat_interleave(step)
        problems += _distribution(path, [numbers(r)[varying] for r in refs], numbers(got)[varying], correlated)
    return problems


def _distribution(path: str, refs: list[torch.Tensor], got: torch.Tensor, correlated: bool) -> list[str]:
    pooled = torch.cat(refs)
    if pooled.isfinite().all() and not got.isfinite().all():
        return [f"{path}: {int((~got.isfinite()).sum())} values are not finite; ordinary ones are {_brief(pooled)}"]
    low, high = float(pooled.min()), float(pooled.max())
    slack = (3.0 if len(got) < FEW else 1.0) * (high - low) + 1e-12
    if float(got.min()) < low - slack or float(got.max()) > high + slack:
        return [f"{path}: values out of range: ordinary {_brief(pooled)}, got {_brief(got)}"]
    if len(got) < FEW:
        return []
    zeros = int((got == 0).sum())
    if zeros > 1 and not (pooled == 0).any():
        return [f"{path}: {zeros} sampled values are exactly 0 (first at {int((got == 0).nonzero()[0])} of {len(got)})"]
    if float(got.std()) == 0 and all(float(r.std()) > 0 for r in refs):
        return [f"{path}: all {len(got)} sampled values are equal: ordinary {_brief(pooled)}, got {_brief(got)}"]
    parts = [("as a whole", slice(None))]
    if len(got) >= 512 and not correlated:
        n = len(got)
        edges = [i * n // 8 for i in range(9)]
        parts += [(f"in elements {a} to {b}", slice(a, b)) for a, b in itertools.pairwise(edges)]
        parts += [(f"in every 8th element from {i}", slice(i, None, 8)) for i in range(8)]
    for where, part in parts:
        trouble = _ks([r[part] for r in refs], got[part], 0.5 if correlated else 0.0)
        if trouble:
            return [f"{path}: distribution differs {where}: {trouble}"]
    return []


def _ks(refs: list[torch.Tensor], got: torch.Tensor, at_least: float) -> str:
    refs, got = [_thin(r) for r in refs], _thin(got)
    distance, allowed = _distance(torch.cat(refs), got)
    allowed = max(allowed, at_least)
    if distance <= allowed:
        return ""
    # Values that are not independent (a sampled scale, an orthogonal matrix) differ as much among ordinary modules.
    for i, one in enumerate(refs):
        others = torch.cat(refs[:i] + refs[i + 1 :])
        allowed = max(allowed, 2.5 * _distance(others, one)[0])
    if distance <= allowed:
        return ""
    return (
        f"Kolmogorov-Smirnov distance {distance:.3f}, allowed {allowed:.3f};"
        f" ordinary {_brief(torch.cat(refs))}, got {_brief(got)}"
    )


def _thin(x: torch.Tensor) -> torch.Tensor:
    return x if len(x) <= MOST else x[:: math.ceil(len(x) / MOST)]


def _distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    a, b = a.sort().values, b.sort().values
    points = torch.cat([a, b])
    gap = 0.0
    for right in (False, True):
        fa = torch.searchsorted(a, points, right=right).double() / len(a)
        fb = torch.searchsorted(b, points, right=right).double() / len(b)
        gap = max(gap, float((fa - fb).abs().max()))
    return gap, KS * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))


def _brief(x: torch.Tensor) -> str:
    x = x.double()
    if not len(x):
        return "(nothing)"
    std = float(x.std()) if len(x) > 1 else 0.0
    return f"(mean {float(x.mean()):.4g}, std {std:.4g}, min {float(x.min()):.4g}, max {float(x.max()):.4g})"


def _scalars(refs: list[Snapshot], got: Snapshot, undefined: tuple[str, ...], tolerance: float) -> list[str]:
    problems = []
    for path, value in got.scalars.items():
        theirs = [r.scalars[path] for r in refs if path in r.scalars]
        if not theirs or any(path.startswith(u) for u in undefined):
            continue
        if type(value) is not type(theirs[0]):
            problems.append(f"{path}: ordinary a {type(theirs[0]).__name__}, got a {type(value).__name__}")
        elif all(repr(t) == repr(theirs[0]) for t in theirs):
            close = isinstance(value, float) and tolerance and math.isclose(value, theirs[0], rel_tol=tolerance)
            if repr(value) != repr(theirs[0]) and not close:
                problems.append(f"{path}: ordinary {theirs[0]!r:.300}, got {value!r:.300}")
        elif isinstance(value, float):
            low, high = min(theirs), max(theirs)
            if not math.isfinite(value) or not low - 9 * (high - low) <= value <= high + 9 * (high - low):
                problems.append(f"{path}: ordinary ones are {theirs}, got {value!r}")
    return problems


def _equalities(refs: list[Snapshot], got: Snapshot) -> list[str]:
    """Tensors with the same contents: copies must stay copies, independent samples must stay independent."""
    always = _copies(refs[0])
    for other in refs[1:]:
        always &= _copies(other)
    ever = set().union(*(_copies(r) for r in refs))
    here = _copies(got)
    lost, new = sorted(always - here), sorted(here - ever)
    problems = [f"{a} and {b} have equal values in every ordinary module, but not here" for a, b in lost]
    return problems + [f"{a} and {b} have equal values here, but in no ordinary module" for a, b in new]


def _copies(snap: Snapshot) -> set[tuple[str, str]]:
    groups: dict[bytes, list[str]] = {}
    for path, item in snap.held.items():
        t = item.tensor
        if readable(t) and FEW <= t.numel() <= 1 << 20 and t.layout == torch.strided:
            raw = bits(t)
            if not (raw == raw[0]).all():  # constants are equal by chance
                groups.setdefault(raw.numpy().tobytes(), []).append(path)
    return {(g[0], other) for g in groups.values() for other in g[1:]}
