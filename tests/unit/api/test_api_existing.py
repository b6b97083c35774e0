"""Modules that exist already: filled in place, untouched by refusal, on ``meta``; and what stops a load half way."""

import itertools
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weightlift as wl


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Conv2d(2, 3, 3))


def fresh_state(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else torch.tensor(9)
        for name, tensor in build().state_dict().items()
    }


def bits(module):
    return {name: (t.dtype, t.contiguous().reshape(-1).view(torch.uint8).tolist()) for name, t in state_of(module)}


def state_of(module):
    return [(n, t.detach()) for n, t in [*module.named_parameters(), *module.named_buffers()]]


def identity(module):
    return {n: (id(t), t.data_ptr()) for n, t in [*module.named_parameters(), *module.named_buffers()]}


@pytest.fixture
def ckpt(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(fresh_state(), path)
    return path


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_filled_in_place(ckpt, copy, kind):
    module = build()
    module[2].weight.data = module[2].weight.data.to(memory_format=torch.channels_last)
    strides = module[2].weight.stride()
    before = identity(module)
    module[0].weight.note = "mine"
    module[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(module[2].parameters(), lr=1.0)
    got = wl.load(module, ckpt if kind == "file" else fresh_state(), copy=copy)
    assert got is module and identity(module) == before
    assert module[2].weight.stride() == strides
    assert module[0].weight.note == "mine" and not module[0].weight.requires_grad
    assert optimizer.param_groups[0]["params"][0] is module[2].weight
    assert all(torch.equal(t, fresh_state()[n]) for n, t in state_of(module))


def test_filled_in_place_after_a_forward(ckpt):
    module = build()
    out = module[0](torch.ones(2, 6)).sum()
    wl.load(module, ckpt)
    out.backward()
    assert torch.equal(module[0].weight, fresh_state()["0.weight"])


def test_what_is_missing_keeps_its_value(tmp_path):
    state = fresh_state()
    del state["0.weight"], state["1.running_mean"]
    module = build()
    before, old = identity(module), bits(module)
    wl.load(module, state, strict=False)
    assert identity(module) == before
    assert bits(module)["0.weight"] == old["0.weight"] and bits(module)["1.running_mean"] == old["1.running_mean"]
    want = build()
    want.load_state_dict(state, strict=False)
    assert bits(module) == bits(want)


def test_a_mismatch_that_is_ignored_keeps_its_value():
    module = build()
    old = bits(module)
    wl.load(module, {**fresh_state(), "0.weight": torch.zeros(2, 2)}, ignore_mismatched=True)
    assert bits(module)["0.weight"] == old["0.weight"] and bits(module)["0.bias"] != old["0.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_keeps_the_parameters(ckpt, dtype):
    module = build()
    before = dict(module.named_parameters())
    wl.load(module, ckpt, dtype=dtype)
    after = dict(module.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    for name, tensor in state_of(module):
        want = fresh_state()[name]
        assert torch.equal(tensor, want.to(dtype) if want.is_floating_point() else want)


def test_gradients_are_cast_with_their_parameters(ckpt):
    module, ordinary = build(), build()
    for one in (module, ordinary):
        one[0](torch.ones(2, 6)).square().sum().backward()
    grad = module[0].weight.grad
    wl.load(module, ckpt, dtype=torch.bfloat16)
    ordinary.load_state_dict(load_file(ckpt))
    ordinary.to(torch.bfloat16)
    assert module[0].weight.grad is grad
    for one in (module, ordinary):
        one[0](torch.ones(2, 6, dtype=torch.bfloat16)).square().sum().backward()
    assert grad.dtype == torch.bfloat16 and torch.equal(grad, ordinary[0].weight.grad)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched", "collision"])
def test_a_refused_plan_changes_nothing(change):
    state, options = fresh_state(), {}
    if change == "missing":
        del state["2.bias"]
    elif change == "unexpected":
        state["new"] = torch.zeros(1)
    elif change == "mismatched":
        state["2.bias"] = torch.zeros(4)
    else:
        options["key_mapping"] = {"0.bias": "2.bias"}
    module = build()
    before = identity(module), bits(module)
    plan = wl.plan(module, state, **options)
    assert plan.problems
    for call in (plan.execute, lambda: wl.load(module, state, **options)):
        with pytest.raises(wl.PlanError):
            call()
    assert (identity(module), bits(module)) == before


def test_planning_changes_nothing(ckpt):
    module = build()
    before = identity(module), bits(module)
    str(wl.plan(module, ckpt, dtype=torch.bfloat16)), wl.plan(module, ckpt).to_json()
    assert (identity(module), bits(module)) == before


class Expanded(nn.Module):
    def __init__(self, view=False):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.register_buffer("position", torch.arange(8).expand((1, -1)))
        one = torch.zeros(2)
        self.same = nn.Parameter(one[:1].expand(4))
        self.window = nn.Parameter(torch.zeros(5).unfold(0, 3, 1))
        if view:
            self.register_buffer("one", one, persistent=False)


def of_expanded():
    return {
        "first.weight": torch.ones(2, 2), "first.bias": torch.ones(2), "position": torch.arange(8).view(1, 8) + 5,
        "same": torch.tensor([1.0, 2.0, 3.0, 4.0]), "window": torch.arange(9.0).view(3, 3),
    }  # fmt: skip


def test_an_expanded_parameter_of_a_callable_gets_memory_for_all_its_elements():
    loaded = wl.load(Expanded, of_expanded())
    assert all(torch.equal(tensor, of_expanded()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.same.is_contiguous() and loaded.window.is_contiguous()


@pytest.mark.parametrize("make", [Expanded, lambda: lambda: Expanded(view=True)], ids=["existing", "with a view"])
def test_an_expanded_parameter_that_has_to_keep_its_memory_is_refused_before_anything_is_written(make):
    subject = make()
    plan = wl.plan(subject, of_expanded())
    assert any(problem.fqn == "same" and "expanded" in str(problem) for problem in plan.problems)
    before = bits(subject) if isinstance(subject, nn.Module) else None
    with pytest.raises(wl.PlanError, match="same: elements of the parameter share memory"):
        plan.execute()
    assert before is None or bits(subject) == before


def test_an_expanded_parameter_that_is_cast_has_new_memory_anyway():
    loaded = wl.load(Expanded(), {**of_expanded()}, dtype=torch.bfloat16)
    assert torch.equal(loaded.same, of_expanded()["same"].bfloat16())


# -- meta -------------------------------------------------------------------------------------------------------------


def on_meta():
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("how", ["existing", "callable", "not deferred"])
def test_a_module_on_meta_comes_to_the_cpu(ckpt, copy, how):
    module = on_meta()
    module[0].weight.requires_grad_(False)
    module[0].weight.note = "mine"
    got = wl.load(module if how == "existing" else lambda: module, ckpt, copy=copy, defer=how != "not deferred")
    assert got is module
    assert all(t.device.type == "cpu" and torch.equal(t, fresh_state()[n]) for n, t in state_of(got))
    assert not got[0].weight.requires_grad and got[0].weight.note == "mine"
    assert isinstance(got[0].weight, nn.Parameter) and got[0].bias.requires_grad


def test_a_module_on_meta_with_a_dtype(ckpt):
    got = wl.load(on_meta(), ckpt, dtype=torch.bfloat16)
    assert got[0].weight.dtype == torch.bfloat16 and got[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("how", ["existing", "callable"])
def test_meta_without_a_value_is_an_error_that_names_it(how):
    state = fresh_state()
    del state["2.bias"], state["1.running_var"]
    module = on_meta()
    with pytest.raises(wl.WeightliftError) as caught:
        wl.load(module if how == "existing" else lambda: module, state, strict=False)
    assert "2.bias" in str(caught.value) and "1.running_var" in str(caught.value)
    assert "0.weight" not in str(caught.value)


def test_meta_without_a_value_is_known_to_the_plan():
    state = fresh_state()
    del state["2.bias"]
    module = on_meta()
    assert any(problem.fqn == "2.bias" for problem in wl.plan(module, state, strict=False).problems)
    with pytest.raises(wl.WeightliftError):
        wl.load(module, state, strict=False)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_what_no_checkpoint_can_give_is_not_to_be_added_to_one():
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("saved", torch.ones(1))
        module.register_buffer("computed", torch.ones(1), persistent=False)
    saved, computed = wl.plan(module, nn.Linear(2, 2).state_dict(), strict=False).problems
    assert saved.hint == "build it outside torch.device('meta'), or add it to the checkpoint"
    assert computed.hint == "build it outside torch.device('meta')"


# -- interruptions ----------------------------------------------------------------------------------------------------


def big(n=40):
    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(n)))


@pytest.fixture
def big_ckpt(tmp_path):
    path = tmp_path / "big.safetensors"
    save_file({k: torch.full_like(v, 0.5) for k, v in big().state_dict().items()}, path)
    return path


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"dtype": torch.float16}, {"workers": 1, "copy": True}])
def test_progress_grows_and_ends_with_all(big_ckpt, options):
    calls = []
    wl.load(big, big_ckpt, progress=lambda done, total: calls.append((done, total, threading.get_ident())), **options)
    assert calls[-1][0] == calls[-1][1] == sum(e.nbytes for e in wl.open_checkpoint(big_ckpt).values())
    assert len({total for _, total, _ in calls}) == 1 and {ident for *_, ident in calls} == {threading.get_ident()}
    assert all(a[0] < b[0] for a, b in itertools.pairwise(calls))


def test_progress_counts_initialisers(big_ckpt):
    calls = []
    wl.load(big, {}, strict=False, progress=lambda *pair: calls.append(pair))
    assert calls[-1][0] == calls[-1][1] == 40 * (128 * 128 + 128) * 4


def test_an_error_of_progress_reaches_the_caller(big_ckpt):
    def fail(done, total):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        wl.load(big, big_ckpt, progress=fail, copy=True)


@pytest.mark.parametrize("workers", [1, 4])
def test_cancelled_before(big_ckpt, workers):
    cancel = threading.Event()
    cancel.set()
    module = big()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for subject in (big, module):
        with pytest.raises(wl.LoadCancelled):
            wl.load(subject, big_ckpt, cancel=cancel, workers=workers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("workers", [1, 4])
def test_cancelled_on_the_way(big_ckpt, workers):
    cancel = threading.Event()
    module = big()
    old = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(wl.LoadCancelled) as caught:
        wl.load(
            module, big_ckpt, cancel=cancel, workers=workers, memory_budget_bytes=1 << 16,
            progress=lambda done, total: cancel.set() if done else None,
        )  # fmt: skip
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, old[name])}
    assert changed and changed <= set(caught.value.written) and len(changed) < len(old)


def test_a_cancelled_load_can_be_made_again(big_ckpt):
    cancel = threading.Event()
    module = big()
    plan = wl.plan(module, big_ckpt, cancel=cancel)
    cancel.set()
    with pytest.raises(wl.LoadCancelled):
        plan.execute()
    cancel.clear()
    assert torch.equal(plan.execute()[3].weight, torch.full((128, 128), 0.5))


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("change", ["cut", "gone", "replaced"])
def test_a_file_that_changes_after_the_plan(big_ckpt, copy, existing, change):
    module = big()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    plan = wl.plan(module if existing else big, big_ckpt, copy=copy)
    if change == "cut":
        os.truncate(big_ckpt, big_ckpt.stat().st_size // 2)
    elif change == "gone":
        big_ckpt.unlink()
    else:
        other = big_ckpt.with_name("other")
        save_file({k: v + 1 for k, v in load_file(big_ckpt).items()}, other)
        os.replace(other, big_ckpt)
    with pytest.raises((wl.CheckpointChanged, wl.TransferError), match=str(big_ckpt)):
        plan.execute()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_a_backward_of_a_forward_before_the_load_is_refused_as_after_load_state_dict(ckpt, kind, dtype):
    module = build()
    out = module[0](torch.ones(2, 6, requires_grad=True)).sum()  # its backward needs the weight of then
    wl.load(module, ckpt if kind == "file" else fresh_state(), dtype=dtype)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_view_of_a_filled_weight_counts_as_changed_too():
    tied = nn.Module()
    tied.emb = nn.Embedding(6, 4)
    tied.head = nn.Linear(4, 6, bias=False)
    tied.head.weight = nn.Parameter(tied.emb.weight)
    out = tied.head(torch.ones(2, 4, requires_grad=True)).sum()
    wl.load(tied, {"emb.weight": torch.ones(6, 4)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_load_that_stops_half_way_counts_as_a_change(big_ckpt):
    module, cancel = big(), threading.Event()
    out = module(torch.ones(2, 128, requires_grad=True)).sum()
    with pytest.raises(wl.LoadCancelled) as error:
        wl.load(module, big_ckpt, cancel=cancel, workers=1, memory_budget_bytes=1 << 16,
                progress=lambda done, total: cancel.set() if done else None)  # fmt: skip
    assert error.value.written
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_plan_that_is_refused_is_no_change():
    module = big(1)
    out = module(torch.ones(2, 128, requires_grad=True)).sum()
    with pytest.raises(wl.PlanError):
        wl.load(module, {"0.weight": torch.ones(128, 128)})
    out.backward()


# -- a module that is no longer what was planned for ------------------------------------------------------------------


def other_weight(module):
    module[0].weight = nn.Parameter(torch.ones(5, 6))


def other_module(module):
    module[0] = nn.Linear(6, 5)


def cast(module):
    module.half()


def grown(module):
    module[0].register_buffer("more", torch.ones(3))


def shrunk(module):
    del module[2]


def reshaped(module):
    module[0].weight.data = torch.ones(6, 5)


@pytest.mark.parametrize("change", [other_weight, other_module, cast, grown, shrunk, reshaped])
def test_a_module_that_changed_since_the_plan_is_refused_and_left(ckpt, change):
    module = build()
    plan = wl.plan(module, ckpt)
    change(module)
    before = bits(module)
    with pytest.raises(wl.PlanError, match=r"since the plan was made.* — make the plan again"):
        plan.execute()
    assert bits(module) == before
    if change in (other_weight, other_module, cast):
        wl.plan(module, ckpt).execute()


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"copy": True}])
@pytest.mark.parametrize("make", [build, on_meta])
def test_a_plan_for_a_module_that_existed_can_be_executed_again(ckpt, options, make):
    module = make()
    plan = wl.plan(module, ckpt, **options)
    plan.execute()
    wanted = bits(module)
    with torch.no_grad():
        module[0].weight.zero_()
    assert bits(plan.execute()) == wanted
