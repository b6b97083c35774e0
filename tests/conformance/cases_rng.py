"""Constructors that seed: from there sampling runs as it would, so that its values are what the author meant."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from .cases import Bag, case, equal, holds


def _projection() -> torch.Tensor:
    torch.manual_seed(42)
    return torch.randn(64, 64)


@case(kind="seeded")
def manual_seed_for_a_fixed_projection() -> nn.Module:
    return Bag(projection=_projection())


@case(kind="seeded", process_seed=42)
def manual_seed_with_the_seed_of_the_process() -> nn.Module:
    return Bag(projection=_projection())


@case(kind="sampled", process_seed=42, leaves_rng=False, repeatable=False, missing=False)
def sampled_before_then_seeded_with_the_seed_of_the_process() -> nn.Module:
    first = nn.Parameter(torch.randn(64, 64) * 9)
    return Bag(first=first, projection=_projection())


@case(leaves_rng=False)
def layers_before_and_a_seeded_table_after() -> nn.Module:
    lin = nn.Linear(64, 64)
    table = _projection()
    return Bag(lin=lin, table=table)


@case(kind="seeded")
def everything_after_the_seed() -> nn.Module:
    torch.manual_seed(7)
    lin = nn.Linear(64, 64)
    w = nn.Parameter(torch.empty(64, 64))
    nn.init.trunc_normal_(w, std=1.0, a=-1.0, b=1.0)
    q = nn.Parameter(torch.empty(64, 64))
    nn.init.orthogonal_(q)
    return Bag(lin=lin, w=w, q=q, r=nn.Parameter(torch.rand(64, 64) * 2), p=torch.randperm(99))


@case(kind="seeded")
def default_generator_seeded() -> nn.Module:
    torch.default_generator.manual_seed(5)
    a = torch.randn(64, 64)
    torch.random.manual_seed(6)
    return Bag(a=a, b=torch.empty(64, 64).uniform_())


@case(check=lambda m: equal(m.a, m.b, "the same seed in two forks"))
def fork_rng() -> nn.Module:
    """The fork gives the state back, so what follows is sampled as ever."""
    before = nn.Linear(64, 64)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        a = torch.randn(64, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        b = torch.empty(64, 64).normal_()
    return Bag(before=before, a=a, b=b, after=nn.Linear(64, 64))


def _forked(m: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    equal(m.a, torch.randn(64, 64, generator=generator), "what seed 3 means")


@case(check=_forked, kind="seeded")
def fork_rng_alone() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Bag(a=torch.randn(64, 64))


@case(kind="seeded")
def state_saved_and_put_back_by_hand() -> nn.Module:
    state = torch.get_rng_state()
    torch.manual_seed(11)
    a = torch.rand(64, 64)
    torch.set_rng_state(state)
    return Bag(a=a)


@case(kind="seeded")
def explicit_generator() -> nn.Module:
    g = torch.Generator().manual_seed(9)
    w = nn.Parameter(torch.empty(64, 64).normal_(generator=g))
    return Bag(
        w=w,
        x=torch.rand(64, 64, generator=g),
        p=torch.randperm(64, generator=g),
        r=torch.randint(9, (64,), generator=g),
    )


@case(kind="seeded", check=lambda m: holds(not torch.equal(m.a, m.b), "two draws from one generator are equal"))
def explicit_generator_used_between_default_draws() -> nn.Module:
    g = torch.Generator()
    g.manual_seed(1)
    a = torch.randn(64, 64, generator=g)
    scratch = torch.randn(64, 64)
    b = torch.empty(64, 64).normal_(generator=g)
    scratch.zero_()
    return Bag(a=a, b=b, scratch=scratch)


@case(kind="seeded")
def explicit_generator_reseeded_after_use() -> nn.Module:
    """The recorded call must use the generator as it was then."""
    g = torch.Generator().manual_seed(1)
    a = torch.empty(64, 64).normal_(generator=g)
    g.manual_seed(2)
    b = torch.empty(64, 64).normal_(generator=g)
    g.manual_seed(1)
    return Bag(a=a, b=b, c=torch.empty(64, 64).normal_(generator=g))


@case(kind="exact")
def numpy_and_python_random() -> nn.Module:
    """Sampled, but not by torch: these run as they are (the suite seeds them)."""
    w = nn.Parameter(torch.from_numpy(np.random.randn(64, 64).astype(np.float32)))
    order = list(range(64))
    random.shuffle(order)
    b = torch.tensor(order)
    return Bag(w=w, b=b, c=torch.tensor([random.gauss(0, 1) for _ in range(64)]))


@case(check=lambda m: holds(m.a.unique().numel() > 4000, "repeated values"))
def many_draws_are_independent() -> nn.Module:
    return Bag(
        a=nn.Parameter(torch.rand(64, 64)),
        b=nn.Parameter(torch.rand(64, 64)),
        layers=nn.ModuleList([nn.Linear(16, 16) for _ in range(12)]),
        c=torch.rand(64, 64) + torch.rand(64, 64),
        d=nn.Parameter(torch.cat([torch.rand(32, 64), torch.rand(32, 64)])),
    )


def _halves(m: Any) -> None:
    holds(not torch.equal(m.d[:32], m.d[32:]), "the halves of d are one sample")
    holds(not torch.equal(m.e[0], m.e[1]), "the rows of e are one sample")
    difference = m.f.detach()
    holds(difference.abs().max() > 0, "the difference of two samples is zero")


@case(check=_halves)
def draws_within_one_tensor_are_independent() -> nn.Module:
    e = nn.Parameter(torch.empty(2, 2048))
    for row in e.data:
        row.normal_()
    return Bag(
        d=nn.Parameter(torch.cat([torch.rand(32, 64), torch.rand(32, 64)])),
        e=e,
        f=nn.Parameter(torch.rand(64, 64) - torch.rand(64, 64)),
    )


@case(check=lambda m: holds(not torch.equal(m.a.flatten()[:64], m.read), "the value read is the parameter's"))
def sampled_reads_do_not_repeat_parameters() -> nn.Module:
    """What the constructor reads is seeded by its ordinal, what it keeps by its name: never the same stream."""
    read = torch.tensor(torch.randn(64, 64).flatten()[:64].tolist())
    again = torch.tensor(torch.randn(64, 64).flatten()[:64].tolist())
    holds(not torch.equal(read, again), "two reads gave one sample")
    return Bag(a=nn.Parameter(torch.randn(64, 64)), read=read, again=again)


@case(kind="seeded")
def random_fourier_features() -> nn.Module:
    """As performer and friends do: a seeded block, orthogonalised, kept as a buffer that no checkpoint has."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.linalg.qr(torch.randn(32, 32, generator=generator))[0].T for _ in range(2)]
    bag = Bag()
    bag.register_buffer("features", torch.cat(blocks) * 32**0.5, persistent=False)
    return bag


@case(kind="seeded")
def sobol_points() -> nn.Module:
    return Bag(points=torch.quasirandom.SobolEngine(4, scramble=True, seed=1).draw(256))


@case()
def initial_seed_is_read() -> nn.Module:
    seed = torch.initial_seed()
    assert isinstance(seed, int)
    return Bag(w=nn.Parameter(torch.randn(64, 64)), g=nn.Linear(64, 64))
