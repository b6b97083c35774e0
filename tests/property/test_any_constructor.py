"""Constructors made up at random: views, ties, values computed from others, in-place calls, reads, tensors held aside.

Loading into one has to give what torch gives: the constructor's values, with ``load_state_dict`` on top of them, and
the same memory shared by the same tensors.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.property.search import SEARCH
from torch import nn

import weightlift as wl

SEED = 7
SHAPES = [(4,), (4, 4), (3, 4), (1, 4), (40, 50), (0, 4)]
FILLS: list[Callable[[torch.Tensor], object]] = [
    lambda t: nn.init.normal_(t),
    lambda t: nn.init.uniform_(t, -2, 2),
    lambda t: t.copy_(torch.arange(t.numel(), dtype=t.dtype).view(t.shape)),
    lambda t: t.fill_(3),
    lambda t: nn.init.trunc_normal_(t),
]
VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t.detach(),
    lambda t: t.data,
    lambda t: t.mT if t.dim() > 1 else t.detach(),
    lambda t: t[1:] if t.dim() else t,
    lambda t: t[::2] if t.dim() else t,
    lambda t: t.view(-1) if t.is_contiguous() else t,
    lambda t: t.unsqueeze(0),
    lambda t: t[..., :1] if t.dim() else t,
    lambda t: torch._neg_view(t) if t.is_floating_point() else t,
]
CALCULATIONS: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda a, b: a * 2 + 1,
    lambda a, b: a.cumsum(0) if a.dim() else a + 1,
    lambda a, b: a.clone(),
    lambda a, b: torch.cat([a.reshape(-1), b.reshape(-1)]),
    lambda a, b: a + b if a.shape == b.shape else a - 1,
    lambda a, b: a.flip(0) if a.dim() else a * 3,
    lambda a, b: a.mean(0) if a.dim() and a.numel() and a.is_floating_point() else a.clone(),
    lambda a, b: a + torch.randn(a.shape),
]
CHANGES: list[Callable[[torch.Tensor, torch.Tensor], object]] = [
    lambda a, b: a.mul_(2),
    lambda a, b: a.add_(1),
    lambda a, b: a.copy_(b) if a.shape == b.shape else a.sub_(1),
    lambda a, b: a.normal_() if a.is_floating_point() else a,
    lambda a, b: a.zero_(),
    lambda a, b: a.add_(b) if a.shape == b.shape else a,
]


def by_pieces(table: torch.Tensor) -> None:
    """More writes to parts of it than are put off."""
    for place in range(70 if table.dim() and len(table) else 0):
        row = table[place % len(table)]
        if row.dim() and row.numel():
            table[place % len(table), place % len(row)] = place
        else:
            row.fill_(place)


def out_of_pieces(table: torch.Tensor, other: torch.Tensor) -> None:
    """The same out of what another one is by then."""
    for place in range(70 if table.dim() and table.shape == other.shape and len(table) else 0):
        table[place % len(table)] = other[(place + 1) % len(table)]


CHANGES += [lambda a, b: by_pieces(a), out_of_pieces]
LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(4, 4),
    lambda: nn.LayerNorm(4),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    lambda: nn.MultiheadAttention(4, 2),
    lambda: nn.GRU(4, 4),
]

number = st.integers(0, 30)
step = st.one_of(
    st.tuples(st.just("new"), number, number),
    st.tuples(st.just("view"), number, number),
    st.tuples(st.just("calculate"), number, number, number),
    st.tuples(st.just("change"), number, number, number),
    st.tuples(st.just("parameter"), number, number),
    st.tuples(st.just("buffer"), number, number),
    st.tuples(st.just("tie"), number, number),
    st.tuples(st.just("module"), number),
    st.tuples(st.just("layer"), number, number),
    st.tuples(st.just("deepcopy"), number),
    st.tuples(st.just("data"), number, number),
    st.tuples(st.just("numpy"), number),
    st.tuples(st.just("integers"), number, number),
    st.tuples(st.just("read"), number),
    st.tuples(st.just("hold"), number),
    st.tuples(st.just("drop"), number),
)
programs = st.lists(step, min_size=2, max_size=18).map(lambda steps: [("new", 1, 0), *steps, ("parameter", 0, 1)])


class Made(nn.Module):
    """What a program builds."""

    def __init__(self, program):
        super().__init__()
        self.inner = nn.Module()
        self.held = []
        env: list[torch.Tensor] = []
        for at, (name, *numbers) in enumerate(program):
            with torch.no_grad():
                self._do(at, name, numbers, env)

    def _do(self, at, name, numbers, env):
        def one(place=0):
            return env[numbers[place] % len(env)]

        owner = self.inner if numbers[-1] % 3 == 0 else self
        if name == "new":
            env.append(torch.empty(SHAPES[numbers[0] % len(SHAPES)]))
            FILLS[numbers[1] % len(FILLS)](env[-1])
        elif name == "tie":
            known = list(self.parameters())
            if known:
                owner.register_parameter(f"t{at}", known[numbers[0] % len(known)])
        elif name == "module":
            setattr(self, f"m{at}", self.inner)
        elif name == "deepcopy":
            setattr(self, f"m{at}", copy.deepcopy(self.inner))
        elif name == "layer":
            setattr(owner, f"l{at}", LAYERS[numbers[0] % len(LAYERS)]())
            env.extend(tensor.data for tensor in getattr(owner, f"l{at}").parameters())
        elif name == "integers":
            env.append(torch.arange(numbers[0]).view(-1, 1).repeat(1, 4))
        elif not env:
            return
        elif name == "view":
            env.append(VIEWS[numbers[1] % len(VIEWS)](one()))
        elif name == "calculate":
            env.append(CALCULATIONS[numbers[2] % len(CALCULATIONS)](one(), one(1)))
        elif name == "change":
            CHANGES[numbers[2] % len(CHANGES)](one(), one(1))
        elif name == "parameter":
            grad = numbers[1] % 4 != 0 and one().is_floating_point()
            owner.register_parameter(f"p{at}", nn.Parameter(one(), requires_grad=grad))
        elif name == "buffer":
            owner.register_buffer(f"b{at}", one(), persistent=numbers[1] % 2 == 0)
        elif name == "read":
            float(one().sum())
        elif name == "numpy":
            np.add(array := one().resolve_neg().numpy(), 1, out=array)
        elif name == "data":
            known = [parameter for parameter in self.parameters() if parameter.dtype == one().dtype]
            if known:
                known[numbers[1] % len(known)].data = one()
        elif name == "hold":
            self.held.append(one())
        elif name == "drop":
            del env[numbers[0] % len(env)]


def refused(program):
    """Whether torch refuses it: then it has to be refused here too, at the same call."""
    try:
        Made(program)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as found:
            wl.defer(lambda: Made(program))
        assert str(found.value) == str(error)
        return True
    return False


def tensors_of(module):
    """Every name with its tensor, and what is held aside."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {**{name: tensor.detach() for name, tensor in named.items()},
            **{f"held {at}": tensor.detach() for at, tensor in enumerate(module.held)}}  # fmt: skip


def shared(module):
    """Which tensors change with which: each is written to in turn. Spoils the values."""
    tensors = tensors_of(module)
    found = set()
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        before = {other: value.clone() for other, value in tensors.items()}
        tensor.add_(1)
        found |= {(name, other) for other, value in tensors.items() if not same(value, before[other])}
    return found


def same(one, other):
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25))


def state_for(module, lacking):
    """New values for all that is saved, those that share memory alike; without some keys."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 5)
    state = {name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}
    state = {name: value.resolve_neg() for name, value in state.items()}
    return {name: value for at, (name, value) in enumerate(state.items()) if at % 5 not in lacking}


def wanted_of(program, state):
    module = wl.defer(lambda: Made(program), seed=SEED).materialize()
    module.load_state_dict(state, strict=False)
    return module


def differing(found, wanted, dtype=None):
    theirs = tensors_of(wanted)
    return [
        name
        for name, value in tensors_of(found).items()
        if not same(value, cast(theirs[name], None if name.startswith("held") else dtype))
    ]


def cast(tensor, dtype):
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


@SEARCH
@given(programs, st.sets(st.integers(0, 4), max_size=3), st.sampled_from([1, 8]), st.booleans(), st.booleans())
def test_a_load_gives_what_torch_gives(program, lacking, workers, copy, in_file):
    if refused(program):
        return
    state = state_for(wl.defer(lambda: Made(program), seed=SEED).materialize(), lacking)
    wanted = wanted_of(program, state)
    with tempfile.TemporaryDirectory() as folder:
        source = {name: value.clone() for name, value in state.items()}  # without a copy their memory is shared
        if in_file:
            source = Path(folder) / "a.safetensors"
            save_file(state, source)
        loaded = wl.load(lambda: Made(program), source, strict=False, seed=SEED, workers=workers, copy=copy)
        assert not differing(loaded, wanted)
        assert shared(loaded) == shared(wanted)
        existing = wl.defer(lambda: Made(program), seed=SEED).materialize()
        wl.load(existing, source if in_file else state, strict=False, workers=workers)
        wanted = wanted_of(program, state)
        assert not differing(existing, wanted)
        assert shared(existing) == shared(wanted)


@SEARCH
@given(programs, st.sets(st.integers(0, 4), max_size=3), st.booleans())
def test_a_load_that_casts_gives_what_torch_gives_cast(program, lacking, is_existing):
    if refused(program):
        return
    state = state_for(wl.defer(lambda: Made(program), seed=SEED).materialize(), lacking)
    wanted = wanted_of(program, state)
    module = wl.defer(lambda: Made(program), seed=SEED).materialize() if is_existing else lambda: Made(program)
    loaded = wl.load(module, state, strict=False, seed=SEED, workers=8, dtype=torch.bfloat16)
    assert not [name for name in differing(loaded, wanted, torch.bfloat16) if not name.startswith("held")]
    named = {pair for pair in shared(wanted) if not any(name.startswith("held") for name in pair)}
    assert {pair for pair in shared(loaded) if not any(name.startswith("held") for name in pair)} == named


SAMPLELESS = {
    "new": [at for at in range(len(FILLS)) if at in (2, 3)],
    "calculate": range(len(CALCULATIONS) - 1),
    "change": [at for at in range(len(CHANGES)) if at != 3],
}


def without_samples(program):
    for name, *numbers in program:
        if name in SAMPLELESS:
            numbers[-1] = SAMPLELESS[name][numbers[-1] % len(SAMPLELESS[name])]
        if name != "layer":
            yield (name, *numbers)


@SEARCH
@given(programs.map(lambda program: list(without_samples(program))))
def test_a_module_is_made_as_by_its_constructor(program):
    if refused(program):
        return
    made, ordinary = wl.defer(lambda: Made(program)).materialize(), Made(program)
    assert not differing(made, ordinary)
    assert shared(made) == shared(ordinary)
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in ordinary.parameters()]


@SEARCH
@given(programs, st.sets(st.integers(0, 4), max_size=3), st.sampled_from([None, torch.bfloat16]), st.booleans())
def test_an_ordinary_construction_is_filled_as_torch_fills_it(program, lacking, dtype, copy):
    if refused(program):
        return

    def build():
        torch.manual_seed(SEED)
        return Made(program)

    state = state_for(build(), lacking)
    wanted = build()
    wanted.load_state_dict(state, strict=False)
    source = {name: value.clone() for name, value in state.items()}
    loaded = wl.load(build, source, strict=False, defer=False, copy=copy, dtype=dtype)
    assert not [name for name in differing(loaded, wanted, dtype) if dtype is None or not name.startswith("held")]
    if dtype is None:
        assert shared(loaded) == shared(wanted)
