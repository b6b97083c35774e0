"""State dicts of lazy modules that have never run: their tensors have no shape and no value."""

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import weightlift as wl

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules")
LAZY = {
    "linear": lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)),
    "batch norm": lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(8, 2)),
}
MADE = {"callable": lambda build: build, "existing": lambda build: build()}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_module_that_has_not_run_either_takes_the_rest(kind, made):
    state, wanted = LAZY[kind]().state_dict(), LAZY[kind]()
    wanted.load_state_dict(state)
    plan = wl.plan(MADE[made](LAZY[kind]), state)
    loaded = plan.execute()
    assert not plan.report.missing_keys and not plan.report.unexpected_keys
    for name, tensor in wanted.state_dict().items():
        found = loaded.state_dict()[name]
        assert is_lazy(found) if is_lazy(tensor) else torch.equal(found, tensor)
    assert loaded.eval()(torch.ones(3, 8)).shape == (3, 2)


@pytest.mark.parametrize("made", MADE)
def test_any_other_module_is_told_which_value_is_none(made):
    state = LAZY["linear"]().state_dict()
    plan = wl.plan(MADE[made](lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))), state)
    assert {problem.key for problem in plan.problems} == {"0.weight", "0.bias"}
    assert all("uninitialised" in str(problem) and "first forward" in str(problem) for problem in plan.problems)


def test_a_hooked_module_is_told_so_too():
    def build():
        module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        module[0].register_load_state_dict_pre_hook(lambda *_: None)
        return module

    assert len(wl.plan(build, LAZY["linear"]().state_dict()).problems) == 2


def test_it_can_not_be_saved(tmp_path):
    with pytest.raises(wl.CheckpointError, match=r"0\.weight"):
        wl.save(LAZY["linear"](), tmp_path)


NORMS = {
    nn.LazyBatchNorm1d: nn.BatchNorm1d,
    nn.LazyBatchNorm2d: nn.BatchNorm2d,
    nn.LazyBatchNorm3d: nn.BatchNorm3d,
    nn.LazyInstanceNorm1d: nn.InstanceNorm1d,
}


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
def test_who_holds_an_uninitialised_buffer_holds_the_module_s_afterwards(kind, made, dtype):
    def build():
        module = kind(affine=True, track_running_stats=True)
        module.held = [module.running_mean, module.running_var, module.weight]
        return module

    state = NORMS[kind](4, affine=True, track_running_stats=True).state_dict()
    state["running_mean"] = torch.arange(4.0)
    wanted = build()
    wanted.load_state_dict(state)
    assert wanted.held[0] is wanted.running_mean  # what torch does
    loaded = wl.load(MADE[made](build), state, dtype=dtype)
    for held, name in zip(loaded.held, ["running_mean", "running_var", "weight"], strict=True):
        assert getattr(loaded, name) is held and type(held) is type(getattr(wanted, name))
        assert held.dtype == (dtype or torch.float32) and torch.equal(held, state[name].to(held.dtype))


def tied_lazily():
    module = nn.Module()
    module.a, module.b, module.c = nn.LazyLinear(3), nn.LazyLinear(3), nn.LazyLinear(3)
    module.b.weight = module.c.weight = module.a.weight
    return module


@pytest.mark.parametrize("made", MADE)
def test_tied_uninitialised_ones_that_differ_are_untied_each_in_its_own_shape(made):
    state = {f"{name}.bias": torch.ones(3) for name in "abc"}
    state |= {"a.weight": torch.ones(3, 4), "b.weight": torch.ones(3, 4) * 2, "c.weight": torch.ones(3, 5)}
    loaded = wl.load(MADE[made](tied_lazily), state, strict=False)
    for name, value in state.items():
        assert torch.equal(loaded.get_parameter(name), value), name


def test_a_plan_knows_the_shape_of_a_tied_uninitialised_one():
    state = {f"{name}.bias": torch.ones(3) for name in "abc"}
    plan = wl.plan(tied_lazily, {**state, "a.weight": torch.ones(3, 4), "b.weight": torch.ones(3, 4)})
    assert {row.fqn: row.shape for row in plan.decisions.rows if row.fqn.endswith("weight")} == {
        "a.weight": (3, 4), "b.weight": (3, 4), "c.weight": (3, 4)
    }  # fmt: skip
