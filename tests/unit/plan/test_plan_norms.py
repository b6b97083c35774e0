"""Torch's own norms have a ``_load_from_state_dict`` for files of old: as torch loads them, and gone through only where
a file is such a one."""

import copy
import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.deferred import rewrite

STATS = ("running_mean", "running_var", "num_batches_tracked")


def norms():
    return list(itertools.product((nn.BatchNorm1d, nn.InstanceNorm1d), (True, False), (True, False)))


def filled(kind, tracks, affine):
    module = nn.Sequential(nn.Linear(2, 2), kind(2, track_running_stats=tracks, affine=affine))
    for number, tensor in enumerate(module.state_dict().values()):
        tensor.fill_(number + 2)
    return module


def by_torch(module, state):
    try:
        return module, *map(set, module.load_state_dict(state, strict=False))
    except RuntimeError as error:
        return str(error).partition("\n\t")[2]


def by_wl(module, state):
    try:
        plan = wl.plan(module, state, strict=False)
        return plan.execute(), set(plan.report.missing_keys), set(plan.report.unexpected_keys)
    except wl.WeightliftError as error:
        return str(error)


@pytest.mark.parametrize("version", [None, 1, 2])
@pytest.mark.parametrize(("kind", "tracks", "affine"), norms())
def test_every_mixture_of_names_is_loaded_as_torch_does(kind, tracks, affine, version):
    for count in range(4):
        for stats in itertools.combinations(STATS, count):
            module = filled(kind, tracks, affine)
            state = OrderedDict((key, value * 0 + 1) for key, value in module.state_dict().items()
                                if not key.endswith(STATS))  # fmt: skip
            for name in stats:
                state[f"1.{name}"] = torch.tensor(7) if name == "num_batches_tracked" else torch.full((2,), 7.0)
            if version is not None:
                state._metadata = {"1": {"version": version}}
            wanted, found = (load(copy.deepcopy(module), copy.copy(state)) for load in (by_torch, by_wl))
            if isinstance(wanted, str):
                assert wanted in found
                continue
            assert found[1:] == wanted[1:], stats
            loaded, expected = found[0].state_dict(), wanted[0].state_dict()
            assert list(loaded) == list(expected)
            assert all(torch.equal(loaded[key], expected[key]) for key in expected), stats


def test_a_file_of_today_is_not_gone_through(monkeypatch):
    module = nn.Sequential(*(filled(*norm) for norm in norms()))
    state = module.state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("0.1.num_batches_tracked")}
    went = []
    real = rewrite._Rehearsal
    monkeypatch.setattr(rewrite, "_Rehearsal", lambda *args, **kwargs: went.append(1) or real(*args, **kwargs))
    for metadata in (state._metadata, None):
        given = OrderedDict(state)
        if metadata is not None:
            given._metadata = metadata
        assert len(wl.plan(module, given).report.loaded) == len(state) and not went
    assert len(wl.plan(module, old).report.loaded) == len(state) - 1 and went


class Renames(nn.Module):
    """A further base of a norm, which its own loading goes on to."""

    def _load_from_state_dict(self, state, prefix, *args):
        if prefix + "gamma" in state:
            state[prefix + "weight"] = state.pop(prefix + "gamma")
        super()._load_from_state_dict(state, prefix, *args)


class RenamingBatchNorm(nn.BatchNorm1d, Renames):
    pass


class RenamingInstanceNorm(nn.InstanceNorm1d, Renames):
    pass


def renamed(norm):
    state = norm.state_dict()
    state["gamma"] = state.pop("weight") * 0 + 7
    return state


@pytest.mark.parametrize("kind", [RenamingBatchNorm, RenamingInstanceNorm])
def test_code_of_a_further_base_runs(kind):
    norm = kind(2, affine=True)
    assert wl.load(kind(2, affine=True), renamed(norm)).weight.tolist() == [7, 7]


def test_what_somebody_put_in_place_of_the_norms_own_runs(monkeypatch):
    real = nn.modules.batchnorm._NormBase._load_from_state_dict

    def ours(self, state, prefix, *args):
        if prefix + "gamma" in state:
            state[prefix + "weight"] = state.pop(prefix + "gamma")
        real(self, state, prefix, *args)

    monkeypatch.setattr(nn.modules.batchnorm._NormBase, "_load_from_state_dict", ours)
    assert wl.load(nn.BatchNorm1d(2), renamed(nn.BatchNorm1d(2))).weight.tolist() == [7, 7]


@pytest.mark.parametrize("stale", [3.0, torch.ones(2)])
def test_stale_statistics_are_refused_whatever_they_are(stale):
    state = {**nn.InstanceNorm1d(2, affine=True).state_dict(), "running_var": stale}
    with pytest.raises(wl.WeightliftError, match="Unexpected running stats"):
        wl.load(nn.InstanceNorm1d(2, affine=True), state, strict=False)


@pytest.mark.parametrize("where", ["class", "instance", "hook"])
def test_code_of_somebody_elses_within_a_norm_runs(where):
    class Doubling(nn.BatchNorm1d):
        def _load_from_state_dict(self, state, prefix, *args):
            state[prefix + "weight"] = state[prefix + "weight"] * 2
            super()._load_from_state_dict(state, prefix, *args)

    norm = Doubling(2) if where == "class" else nn.BatchNorm1d(2)
    if where == "instance":
        norm._load_from_state_dict = lambda *args: Doubling._load_from_state_dict(norm_as(Doubling, norm), *args)
    elif where == "hook":
        norm._register_load_state_dict_pre_hook(lambda state, *_: state.update(weight=state["weight"] * 2))
    state = nn.BatchNorm1d(2).state_dict()
    assert wl.load(norm, state).weight.tolist() == [2, 2]


def norm_as(kind, norm):
    norm.__class__ = kind
    return norm
