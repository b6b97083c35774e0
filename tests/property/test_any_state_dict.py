"""Modules and checkpoints made up at random: state-dict hooks, overrides, extra state, ties, views, lazy modules.

A load has to do what torch's ``load_state_dict`` does to an ordinarily built copy: the same values in the same memory,
the same missing and unexpected keys, the same attributes, the same refusal. That a tied name provides for another, and
what two names of one memory with different values get, is as docs/plan.md says.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.property.made_modules import build, cloned, edits, programs, state_for, stored
from tests.property.made_state_code import kind
from tests.property.search import SEARCH
from torch import nn

import weightlift as wl


def tensors_of(module):
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def described(tensor):
    lazy = torch.nn.parameter.is_lazy(tensor)
    value = None if lazy else tensor.detach().double().nan_to_num(7.25).tolist()
    shape = None if lazy else tuple(tensor.shape)
    return type(tensor).__name__, tensor.requires_grad, tensor.dtype, shape, value, tensor.device.type


def shared(module):
    """Which tensors change with which: each is written to in turn. Spoils the values."""
    tensors = {name: tensor.detach() for name, tensor in tensors_of(module).items()
               if not torch.nn.parameter.is_lazy(tensor) and tensor.numel()}  # fmt: skip
    found = set()
    for name, tensor in tensors.items():
        before = {other: value.clone() for other, value in tensors.items()}
        tensor.fill_(float(tensor.double().mean().nan_to_num(1)) // 1 + 100)
        found |= {(name, other) for other, value in tensors.items() if not same(value, before[other])}
        for other, value in before.items():
            tensors[other].copy_(value)
    return found


def same(one, other):
    return torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25))


def identical(module):
    """Names that are one object."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors_of(module).items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(map(sorted, groups.values()))


def looks(module, tied=()):
    """Everything but sharing."""
    return {
        "tensors": {name: described(tensor) for name, tensor in tensors_of(module).items()},
        "state": list(module.state_dict()),
        "one object": identical(module),
        "notes": [without(getattr(item, "notes", None), tied) for item in module.modules()],
        "told": [without(getattr(item, "told", None), tied) for item in module.modules()],
        "extra": [getattr(item, "extra", None) for item in module.modules()],
        "held": [kind(getattr(item, "held", None)) for item in module.modules()],
        "held values": [listed(getattr(item, "held", None)) for item in module.modules()],
        "marks": [getattr(tensor, "mark", None) for tensor in tensors_of(module).values()],
        "hooks": [len(item._load_state_dict_pre_hooks) for item in module.modules()],
        "modules": [(name, type(item).__name__) for name, item in module.named_modules()],
    }


def cast(tensor, dtype):
    """As a load with ``dtype=`` leaves it."""
    if torch.nn.parameter.is_lazy(tensor) or not tensor.is_floating_point():
        return tensor
    made = tensor.detach().to(dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def listed(tensor):
    lazy = tensor is None or torch.nn.parameter.is_lazy(tensor)
    return None if lazy else tensor.detach().double().nan_to_num(7.25).tolist()


def without(noted, tied):
    """What a tied name provides is missing for torch alone."""
    if isinstance(noted, (list, tuple)):
        return [without(item, tied) for item in noted if not (isinstance(item, str) and item in tied)]
    return noted


@dataclass
class Wanted:
    """What torch does. ``refused``: what it raised, whichever keys are missing."""

    module: nn.Module
    missing: list[str]
    unexpected: list[str]
    error: Exception | None


def wanted_of(program, state):
    module = build(program)
    try:
        keys = module.load_state_dict(state, strict=False)
    except Exception as error:
        return Wanted(module, [], [], error)
    return Wanted(module, list(keys.missing_keys), list(keys.unexpected_keys), None)


def has_post_hooks(module):
    return any(item._load_state_dict_post_hooks for item in module.modules())


def contradicts(plan):
    """Whether two names of one memory got different values: docs/plan.md says what is done then."""
    return bool(plan.decisions.checks)


def exchanged(module):
    """A mapping of the module's own tensors under each other's names: torch would read what it has overwritten."""
    kinds: dict[Any, list[str]] = {}
    state = module.state_dict()
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and not torch.nn.parameter.is_lazy(value):
            kinds.setdefault(kind(value), []).append(name)
    mapping = {name: state[names[at - 1]] for names in kinds.values() for at, name in enumerate(names)}
    copies = cloned(mapping)
    return (lambda: mapping), (lambda: cloned(copies))


def check(program, state, form, strict, way, dtype=None):
    """Load in one way, and compare with torch."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = stored(state, form, folder)
        existing = build(program) if way == "existing" else None
        if form == "plain" and existing is not None:
            ours, theirs = exchanged(existing)
        wanted = wanted_of(program, theirs())
        objects = {} if existing is None else tensors_of(existing)
        before = None if existing is None else looks(existing)
        subject = functools.partial(build, program) if existing is None else existing
        try:
            plan = wl.plan(subject, ours(), strict=strict, defer=way != "ordinary", dtype=dtype)
        except Exception as error:
            assert wanted.error is not None, f"plan raised {error!r}"
            assert (type(error), str(error)) == (type(wanted.error), str(wanted.error))
            return
        if existing is not None:
            assert looks(existing) == before, "planning changed the module"
        tied = set(plan.report.tied)
        missing = [name for name in wanted.missing if name not in tied]
        refuse = wanted.error is not None or (strict and (missing or wanted.unexpected))
        if refuse:
            if contradicts(plan) and not plan.problems:
                return
            assert plan.problems, f"not refused: {wanted.error or (missing, wanted.unexpected)}"
            with pytest.raises(wl.PlanError):
                plan.execute()
            if existing is not None:
                assert looks(existing) == before, "a refused plan changed the module"
            if wanted.error is None:
                same_keys(plan, wanted, missing)
            return
        assert not plan.problems, f"refused: {plan.problems}"
        try:
            loaded = plan.execute()
        except wl.PlanError:
            assert strict and contradicts(plan)
            return
        final = plan._final
        if final.left_out or any(row.untied for row in final.rows):
            return
        same_keys(plan, wanted, missing)
        if dtype is not None:
            assert {name: described(tensor) for name, tensor in tensors_of(loaded).items()} == {
                name: described(cast(tensor, dtype)) for name, tensor in tensors_of(wanted.module).items()
            }, "cast"
            return
        found, expected = looks(loaded, tied), looks(wanted.module, tied)
        differing = [f"{what}: {found[what]} ≠ {expected[what]}" for what in found if found[what] != expected[what]]
        assert not differing, "; ".join(differing)
        if existing is not None:
            kept = {name for name, tensor in tensors_of(loaded).items() if objects.get(name) is tensor}
            assert kept >= kept_by_torch(program, theirs()), "another object"
        found, expected = shared(loaded), shared(wanted.module)
        assert found == expected, f"shared: {found - expected} {expected - found}"


def kept_by_torch(program, state):
    module = build(program)
    alive = tensors_of(module)  # so that no other object gets the place of one of these
    module.load_state_dict(state, strict=False)
    return {name for name, tensor in tensors_of(module).items() if alive.get(name) is tensor}


def same_keys(plan, wanted, missing):
    if has_post_hooks(wanted.module):
        return
    assert set(plan.report.missing_keys) == set(missing), "missing"
    assert set(plan.decisions.announced_unexpected) == set(wanted.unexpected), "unexpected"


@pytest.fixture(autouse=True)
def _quiet():
    log = logging.getLogger("weightlift")
    before = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(before)


@SEARCH
@given(
    programs,
    edits,
    st.sampled_from(["mapping", "plain", "pt", "safetensors"]),
    st.booleans(),
    st.sampled_from(["deferred", "existing", "ordinary"]),
    st.sampled_from([None, None, torch.bfloat16]),
)
def test_a_load_does_what_load_state_dict_does(program, changes, form, strict, way, dtype):
    try:
        state = state_for(program, changes)
    except RuntimeError:
        return
    check(program, state, form, strict, way, dtype)
