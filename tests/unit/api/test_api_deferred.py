"""``defer`` and its handle, ``current_load``, and what a load leaves behind."""

import contextvars
import copy
import threading

import pytest
import torch
from torch import nn

import weightlift as wl

SEEN = []


class Watching(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        SEEN.append(wl.current_load())
        self.lin = nn.Linear(3, 3)
        if inner is not None:
            self.inner = [inner()]
            SEEN.append(wl.current_load())


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


STATE = {"lin.weight": torch.full((3, 3), 2.0), "lin.bias": torch.ones(3)}


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 2)
        self.b = nn.Linear(2, 2, dtype=torch.bfloat16)
        self.c = self.a
        self.register_buffer("t", torch.arange(3))


def test_sizes():
    deferred = wl.defer(Mixed)
    assert deferred.numel == sum(p.numel() for p in Mixed().parameters()) == 16
    assert deferred.nbytes == 10 * 4 + 6 * 2
    assert deferred.buffer_nbytes == 24
    assert "Mixed" in repr(deferred) and "16" in repr(deferred) and deferred.name == "Mixed"


def test_a_huge_module_costs_nothing():
    deferred = wl.defer(lambda: nn.Linear(1 << 20, 1 << 20))
    assert deferred.nbytes == (1 << 42) + (1 << 22)
    assert wl.defer(nn.Identity).numel == 0


def test_lazy_modules_are_counted_by_what_is_known():
    deferred = wl.defer(lambda: nn.LazyLinear(5, bias=True))
    assert deferred.numel == 0
    assert deferred.materialize().has_uninitialized_params()


def test_materialize_once():
    torch.manual_seed(0)
    deferred = wl.defer(Mixed, seed=3)
    module = deferred.materialize()
    assert module.a is module.c and module.t.tolist() == [0, 1, 2]
    assert 0 < module.a.weight.abs().max() <= 0.5 and module.b.weight.dtype == torch.bfloat16
    for call in (deferred.materialize, lambda: deferred.load(STATE), lambda: deferred.plan(STATE)):
        with pytest.raises(RuntimeError, match="already"):
            call()
    assert torch.equal(wl.defer(Mixed, seed=3).materialize().a.weight, module.a.weight)
    assert not torch.equal(wl.defer(Mixed, seed=4).materialize().a.weight, module.a.weight)


def test_materialized_modules_are_ordinary():
    module = wl.defer(lambda: nn.Linear(3, 3)).materialize()
    module(torch.ones(1, 3)).sum().backward()
    assert torch.equal(module.weight.grad, torch.ones(3, 3))
    assert module.weight.is_leaf and module.weight.requires_grad


def test_load_once():
    deferred = wl.defer(Watching)
    module = deferred.load(STATE)
    assert torch.equal(module.lin.weight, STATE["lin.weight"])
    with pytest.raises(RuntimeError, match="already"):
        deferred.load(STATE)


def test_load_takes_the_options_of_load():
    module = wl.defer(Watching).load({"x." + k: v for k, v in STATE.items()}, dtype=torch.float16,
                                     key_mapping={r"^x\.": ""}, copy=True, workers=1)  # fmt: skip
    assert module.lin.weight.dtype == torch.float16
    with pytest.raises(TypeError, match=r"'dtpye' is no option of a load; did you mean 'dtype'\?"):
        wl.defer(Watching).load(STATE, dtpye="float16")
    with pytest.raises(TypeError, match=r"'nonsense' is no option of a load; there are dtype, device,"):
        wl.defer(Watching).load(STATE, nonsense=1)
    with pytest.raises(ValueError, match="dtype"):
        wl.defer(Watching).plan(STATE, dtype="quarter")


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("call", ["load", "plan"])
def test_an_option_that_comes_too_late_is_refused_and_uses_nothing_up(call, value):
    deferred = wl.defer(Watching)
    with pytest.raises(TypeError, match=r"'defer' is no option here: the module has been built"):
        getattr(deferred, call)(STATE, defer=value)
    for name in ("mesh_shape", "placements"):
        with pytest.raises(TypeError, match=f"{name!r} is no option"):
            getattr(deferred, call)(STATE, **{name: None})
    assert torch.equal(deferred.load(STATE).lin.weight, STATE["lin.weight"])


def test_the_seed_of_defer_holds_for_load():
    one = wl.defer(Watching, seed=9).load({}, strict=False).lin.weight
    assert torch.equal(one, wl.load(Watching, {}, strict=False, seed=9).lin.weight)
    assert torch.equal(one, wl.defer(Watching, seed=9).materialize().lin.weight)


def test_planning_does_not_use_it_up():
    deferred = wl.defer(Watching)
    assert "lin.weight" in str(deferred.plan(STATE))
    assert torch.equal(deferred.load(STATE).lin.weight, STATE["lin.weight"])


def test_executing_its_plan_uses_it_up():
    deferred = wl.defer(Watching)
    plan = deferred.plan(STATE)
    assert torch.equal(plan.execute().lin.weight, STATE["lin.weight"])
    with pytest.raises(RuntimeError, match="already"):
        deferred.materialize()


def test_a_refused_plan_leaves_it_usable():
    deferred = wl.defer(Watching)
    with pytest.raises(wl.PlanError):
        deferred.load({})
    assert torch.equal(deferred.load(STATE).lin.weight, STATE["lin.weight"])


def test_an_error_of_the_constructor_reaches_the_caller():
    def fail():
        nn.Linear(2, 2)
        raise ZeroDivisionError("mine")

    for call in (lambda: wl.defer(fail), lambda: wl.load(fail, STATE), lambda: wl.plan(fail, STATE, defer=False)):
        with pytest.raises(ZeroDivisionError, match="mine"):
            call()
        assert wl.current_load() is None
        assert nn.Linear(2, 2).weight.abs().sum() > 0


@pytest.mark.parametrize("module", [None, 3, nn.Linear, lambda: 3])
def test_defer_wants_a_callable_that_gives_a_module(module):
    with pytest.raises(TypeError):
        wl.defer(module)


def test_defer_does_not_take_a_module():
    with pytest.raises(TypeError):
        wl.defer(nn.Linear(2, 2))


# -- current_load -----------------------------------------------------------------------------------------------------


def test_current_load_inside_and_outside(tmp_path):
    assert wl.current_load() is None
    wl.load(Watching, STATE, seed=5)
    wl.load(Watching, STATE, seed=6, defer=False)
    wl.defer(Watching, seed=7)
    assert [(load.source, load.deferred, load.seed) for load in SEEN] == [
        (wl.open_checkpoint(STATE).source, True, 5), (wl.open_checkpoint(STATE).source, False, 6), (None, True, 7),
    ]  # fmt: skip
    assert wl.current_load() is None
    Watching()
    assert SEEN[-1] is None


def test_current_load_names_the_file(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    wl.load(Watching, path)
    assert SEEN[0].source == str(path)


def test_current_load_of_nested_loads():
    inner = {"lin.weight": torch.full((3, 3), 5.0), "lin.bias": torch.zeros(3)}
    made = wl.load(lambda: Watching(lambda: wl.load(Watching, inner, seed=2)), STATE, seed=1)
    assert [load.seed for load in SEEN] == [1, 2, 1]
    assert torch.equal(made.lin.weight, STATE["lin.weight"])
    assert torch.equal(made.inner[0].lin.weight, inner["lin.weight"])
    SEEN.clear()
    made = wl.load(lambda: Watching(lambda: wl.defer(Watching, seed=3).materialize()), STATE, seed=1)
    assert [load.seed for load in SEEN] == [1, 3, 1]
    assert made.inner[0].lin.weight.abs().sum() > 0


def test_current_load_of_other_threads():
    found = {}

    class Starting(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)

            def look(name):
                found[name] = (wl.current_load(), nn.Linear(4, 4).weight.abs().sum().item() > 0)

            context = contextvars.copy_context()
            threads = [
                threading.Thread(target=look, args=("plain",)),
                threading.Thread(target=context.run, args=(look, "copied")),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found["own"] = wl.current_load()

    wl.load(Starting, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, seed=4)
    assert found["plain"] == found["copied"] == (None, True)
    assert found["own"].seed == 4


def test_current_load_of_many_threads(at_once):
    barrier, wrong = threading.Barrier(4), []

    class Slow(nn.Linear):
        def __init__(self, number):
            super().__init__(2, 2)
            barrier.wait()
            if wl.current_load().seed != number:
                wrong.append(number)
            barrier.wait()

    def work(number):
        wl.defer(lambda: Slow(number), seed=number).materialize()
        if wl.current_load() is not None:
            wrong.append(-number)

    at_once(work, 4)
    assert wrong == []


def test_state_dict_hooks_are_no_constructor():
    class Hooked(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self._register_load_state_dict_pre_hook(lambda *args: SEEN.append(wl.current_load()))

    wl.load(Hooked, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert SEEN == [None]


@pytest.mark.parametrize("existing", [True, False])
def test_loading_under_inference_mode(existing):
    with torch.inference_mode():
        module = wl.load(Watching() if existing else Watching, STATE)
        assert torch.is_inference_mode_enabled()
        made = wl.defer(Watching).materialize()
        assert module.lin(torch.ones(1, 3)).sum() == 21 and made.lin(torch.ones(1, 3)).isfinite().all()
    # What torch's own load_state_dict gives can be used outside too, without gradients.
    with torch.no_grad():
        assert module.lin(torch.ones(1, 3)).sum() == 21 and made.lin(torch.ones(1, 3)).isfinite().all()


def test_loading_leaves_ambient_state_alone():
    with torch.no_grad():
        module = wl.load(Watching, STATE)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    module.lin(torch.ones(1, 3)).sum().backward()
    assert module.lin.weight.grad is not None


class Computing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("twice", self.weight * 2, persistent=False)


@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autograd_records_what_it_would_of_the_constructor(defer, mode):
    """A program that infers has it off, and a copy of a model whose buffers have a history is refused."""
    with mode():
        module, ordinary = wl.load(Computing, {"weight": torch.ones(3)}, defer=defer), Computing()
    assert module.twice.requires_grad == ordinary.twice.requires_grad
    if mode is not torch.enable_grad:
        assert torch.equal(copy.deepcopy(module).twice, torch.full((3,), 2.0))


def test_planned_in_one_thread_executed_in_another():
    plan, made = wl.plan(Watching, {"lin.weight": STATE["lin.weight"]}, strict=False, seed=3), []
    thread = threading.Thread(target=lambda: made.append(plan.execute()))
    thread.start()
    thread.join()
    assert torch.equal(made[0].lin.weight, STATE["lin.weight"])
    assert torch.equal(made[0].lin.bias, wl.load(Watching, {}, strict=False, seed=3).lin.bias)


def test_only_one_of_many_threads_gets_the_module(at_once):
    deferred = wl.defer(Watching)

    def work(_):
        try:
            return deferred.materialize()
        except RuntimeError:
            return None

    assert sum(outcome is not None for outcome in at_once(work, 8)) == 1


def test_under_a_device_context_of_the_caller():
    with torch.device("meta"):
        module = wl.load(nn.Linear(3, 3, device="cpu"), {"weight": STATE["lin.weight"], "bias": STATE["lin.bias"]})
        made = wl.load(Watching, STATE)
    assert torch.equal(module.weight, STATE["lin.weight"]) and torch.equal(made.lin.weight, STATE["lin.weight"])


# -- forced -----------------------------------------------------------------------------------------------------------


def test_forced_names_the_line_and_counts_all_that_ran():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(100, 100) * 0.5)
            self.largest = self.weight.abs().max().item()

    forced = wl.defer(Looks).forced
    (site,) = forced
    assert site.startswith("item() at test_api_deferred.py:") and "__init__" in site
    # The sample, its half, the absolute values, the largest.
    assert forced[site] == 3 * 40_000 + 4


def test_nothing_is_forced_by_an_ordinary_module():
    assert wl.defer(lambda: nn.TransformerEncoderLayer(16, 2)).forced == {}


def test_forced_counts_what_a_seed_makes_run_at_once():
    class Seeding(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(42)
                self.weight = nn.Parameter(torch.empty(50, 50).normal_())

    forced = wl.defer(Seeding).forced
    assert list(forced.values()) == [10_000] and "normal_ at test_api_deferred.py:" in next(iter(forced))


def test_what_was_built_on_meta_cannot_be_materialised():
    def build():
        with torch.device("meta"):
            return nn.Linear(3, 2)

    handle = wl.defer(build)
    with pytest.raises(wl.PlanError, match="weight"):
        handle.materialize()
    state = nn.Linear(3, 2).state_dict()
    loaded = handle.load(state)  # nothing was used up
    assert torch.equal(loaded.weight, state["weight"])


class Entangled(nn.Module):
    """What no checkpoint holds is computed of the initial values of a weight, which others see parts of."""

    def __init__(self):
        super().__init__()
        self.x = nn.Linear(300, 300)
        self.y = nn.Linear(300, 300)
        with torch.no_grad():
            self.y.weight.copy_(self.x.weight)
        self.register_buffer("view", self.x.weight.detach()[1])
        self.register_buffer("sums", torch.cumsum(self.y.weight.detach(), 0), persistent=False)


def test_initialisers_that_others_need_do_not_write_over_what_is_read():
    torch.manual_seed(0)
    state = {key: value.clone() for key, value in Entangled().state_dict().items()}
    for seed in range(20):
        model = wl.load(Entangled, state, seed=seed)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), seed
