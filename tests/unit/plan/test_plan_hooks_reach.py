"""State-dict hooks that reach further than their own arguments; the values, as in test_plan_hooks, are torch's own."""

import copy
import functools
from collections import OrderedDict

import pytest
import torch
from test_plan_hooks import Extra, everything, noted, state_of
from torch import nn
from torch.nn.utils import spectral_norm

import weightlift as wl


def both_ways(build, state, **options):
    """Load into a new module and into an existing one; planning first changes nothing."""
    want = build()
    want.load_state_dict(copy.copy(state), **options)
    existing = build()
    before = everything(existing)
    wl.plan(existing, state, **options)
    assert everything(existing) == before
    results = [wl.load(build, state, **options), wl.load(existing, state, **options)]
    for got in results:
        assert everything(got) == everything(want)
    return want, results


@pytest.mark.parametrize("how", ["closure", "default", "partial", "keyword"])
def test_a_hook_that_holds_its_module(how):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(3))
            self.seen = []

            def hook(state, prefix, *args, module=None, other=self):
                module = module or self
                module.seen.append(prefix)
                module.a.data.add_(5)
                state[prefix + "a"] = module.a.detach() + state[prefix + "a"]

            def plain(module, state, prefix, *args):
                hook(state, prefix, module=module)

            hooks = {"closure": hook, "default": lambda s, p, *args, me=self: hook(s, p, module=me),
                     "partial": functools.partial(plain, self),
                     "keyword": functools.partial(hook, module=self)}  # fmt: skip
            self._register_load_state_dict_pre_hook(hooks[how])

    want, results = both_ways(Holding, {"a": torch.ones(3)})
    assert [got.seen for got in results] == [want.seen] * 2 == [[""]] * 2


def test_a_hook_that_takes_itself_off():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(3))
            self.handle = self._register_load_state_dict_pre_hook(self.hook)

        def hook(self, state, prefix, *args):
            self.handle.remove()
            state[prefix + "a"] = state.pop(prefix + "old")

    module = Once()
    wl.plan(module, {"old": torch.ones(3)})
    assert len(module._load_state_dict_pre_hooks) == 1
    hooks = module._load_state_dict_pre_hooks
    wl.load(module, {"old": torch.ones(3)})
    assert module._load_state_dict_pre_hooks is hooks and not hooks
    both_ways(Once, {"old": torch.ones(3)})


def test_an_override_that_adds_modules():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])
            self.widths = {"0": 2}

        def _load_from_state_dict(self, state, prefix, *args):
            while f"{prefix}layers.{len(self.layers)}.weight" in state:
                self.widths[str(len(self.layers))] = 2
                self.layers.append(nn.Linear(2, 2))
            super()._load_from_state_dict(state, prefix, *args)

    state = state_of(nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}))
    want, results = both_ways(Growing, state)
    assert all(got.widths == want.widths and len(got.layers) == 3 for got in results)
    bf16 = wl.load(Growing, state, dtype=torch.bfloat16)
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["buffer", "tensor", "list", "new"])
def test_an_override_that_writes_what_is_no_state(kind):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(2))
            self.register_buffer("count", torch.zeros(2), persistent=False)
            self.tensor = torch.zeros(2)
            self.list = [torch.zeros(2)]
            self.new = None

        def _load_from_state_dict(self, state, prefix, *args):
            value = state.pop(prefix + "count") * 2
            if kind == "new":
                self.new = value
            else:
                {"buffer": self.count, "tensor": self.tensor, "list": self.list[0]}[kind].copy_(value)
            super()._load_from_state_dict(state, prefix, *args)

    want, results = both_ways(Counting, {"a": torch.ones(2), "count": torch.ones(2)})
    for got in results:
        for mine, theirs in ((got.tensor, want.tensor), (got.list[0], want.list[0]), (got.new, want.new)):
            assert mine is theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
def test_attributes_that_share_a_parameters_memory_still_do(options):
    """Old spectral_norm keeps ``weight``, no parameter, in the memory of ``weight_orig`` until the first forward."""

    def build():
        return spectral_norm(nn.Linear(4, 3))

    for subject in (build, build()):
        got = wl.load(subject, state_of(build()), **({} if isinstance(subject, nn.Module) else options))
        assert (got.weight.data_ptr() == got.weight_orig.data_ptr()) == (got.weight.dtype == got.weight_orig.dtype)
    assert got.weight.data_ptr() == got.weight_orig.data_ptr()


@pytest.mark.parametrize("look", [lambda t: torch.from_numpy(t.numpy() * 2), lambda t: torch.tensor(t.tolist())])
def test_an_override_that_looks_past_aten(look):
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(3))

        def _load_from_state_dict(self, state, prefix, *args):
            state[prefix + "a"] = look(state[prefix + "a"])
            super()._load_from_state_dict(state, prefix, *args)

    both_ways(Looking, {"a": torch.rand(3)})


def test_values_that_a_hook_keeps():
    """What a hook puts away outside the module has its value, not a stand-in's zeros."""
    kept = []

    class Keeping(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            kept.append(state.pop(prefix + "scale"))
            super()._load_from_state_dict(state, prefix, *args)

    wl.load(lambda: Keeping(2, 2), {"weight": torch.ones(2, 2), "bias": torch.ones(2), "scale": torch.full((3,), 4.0)})
    assert torch.equal(kept[0], torch.full((3,), 4.0))


def test_a_look_at_a_weight_does_not_change_what_it_is_initialised_with():
    class Looking(nn.Module):
        def __init__(self, look):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.look = look
            self.register_load_state_dict_pre_hook(self.hook)

        @staticmethod
        def hook(module, state, prefix, *args):
            if module.look:
                assert float(module.b.weight.sum()) != 0

    state = {"a.bias": torch.ones(3)}
    got = [wl.load(lambda look=look: Looking(look), state, strict=False, seed=3) for look in (True, False)]
    assert everything(got[0]) == everything(got[1])


def test_a_handle_can_be_planned_again_and_loaded():
    deferred = wl.defer(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    state = state_of(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    for _ in range(2):
        assert not deferred.plan(state).problems
    got = deferred.load(state).state_dict()
    assert all(torch.equal(got[name], value) for name, value in state.items())


def test_ties_between_modules_with_hooks():
    def build():
        module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        module[1].weight = module[0].weight
        module[1].bias = nn.Parameter(module[0].bias.data)
        return module

    state = state_of(build())
    state["0.weight"] = state["1.weight"] = torch.rand(3)
    want, _ = both_ways(build, state)
    for name in ("1.weight", "0.weight"):
        some = OrderedDict((key, value) for key, value in state.items() if key != name)
        for got in (wl.load(build, some), wl.load(build(), some)):
            assert everything(got) == everything(want) and got[0].weight is got[1].weight


@pytest.mark.parametrize("existing", [True, False])
def test_a_post_hook_that_does_not_forgive_enough(existing):
    calls = []

    class Forgiving(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_load_state_dict_post_hook(self.forgive)

        def forgive(self, module, keys):
            assert module is self
            calls.append((list(keys.missing_keys), list(keys.unexpected_keys)))
            if "bias" in keys.missing_keys:
                keys.missing_keys.remove("bias")

    module = Forgiving()
    before = everything(module)
    subject = module if existing else Forgiving
    with pytest.raises(wl.PlanError, match="more"):
        wl.load(subject, {"weight": torch.ones(2, 2), "more": torch.ones(1)})
    assert everything(module) == before
    del calls[:]
    wl.load(subject, {"weight": torch.ones(2, 2)})
    assert calls[-1] == (["bias"], [])


def test_children_set_to_none():
    """torch looks for the first part of a key among the modules, and leaves one that is None alone."""

    def build():
        module = nn.Sequential(nn.BatchNorm1d(2))
        module.register_module("gone", None)
        return module

    both_ways(build, OrderedDict(state_of(build()), **{"gone.weight": torch.ones(2)}))


def test_a_failing_set_extra_state_says_where():
    class Failing(Extra):
        def set_extra_state(self, state):
            raise KeyError("note")

    def build():
        return nn.Sequential(nn.Linear(2, 2), Failing())

    with pytest.raises(wl.TransferError, match=r"1.*set_extra_state of .*Failing raised KeyError") as caught:
        wl.load(build, noted(build, "x").state_dict())
    assert isinstance(caught.value.__cause__, KeyError) and caught.value.problems[0].fqn == "1"


def test_extra_state_that_an_override_makes():
    class Upgrading(Extra):
        def _load_from_state_dict(self, state, prefix, *args):
            state[prefix + "_extra_state"] = {"note": state.pop(prefix + "old_note")}
            super()._load_from_state_dict(state, prefix, *args)

    state = OrderedDict(Extra().lin.state_dict(prefix="lin."), old_note=torch.tensor([3, 4]))
    module = Upgrading()
    wl.plan(module, state)
    assert module.note is None
    for got in (wl.load(Upgrading, state), wl.load(module, state)):
        assert torch.equal(got.note, torch.tensor([3, 4]))


def test_versions_follow_key_mapping(tmp_path):
    state = OrderedDict((f"model.{name}", value) for name, value in nn.BatchNorm1d(3).state_dict().items())
    del state["model.num_batches_tracked"]
    state._metadata = {"": {}, "model": {"version": 2}}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(wl.PlanError, match="num_batches_tracked"):
        wl.load(lambda: nn.BatchNorm1d(3), tmp_path / "a.pt", key_mapping={r"^model\.": ""})


def test_a_value_that_is_no_tensor_in_a_tensors_place():
    for build in (lambda: nn.Linear(2, 2), lambda: nn.BatchNorm1d(2)):
        state = OrderedDict(build().state_dict(), weight="a string")
        with pytest.raises(wl.PlanError, match=r"weight.*(is no tensor|expected torch\.Tensor)"):
            wl.load(build, state, strict=False)


def test_a_hook_under_a_mode_of_the_callers():
    seen = []

    class Watching(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            seen.append((torch.is_inference_mode_enabled(), float(state[prefix + "weight"].sum())))
            super()._load_from_state_dict(state, prefix, *args)

    with torch.inference_mode():
        wl.load(lambda: Watching(2, 2), {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert seen == [(False, 4.0)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_hook_under_a_device_of_the_callers(device):
    state = state_of(Doubling())
    want = Doubling()
    want.load_state_dict(state)
    with torch.device(device):
        got = wl.load(want, state)
    assert everything(got) == everything(want) and not got.a.is_meta


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(3, 2))

    def _load_from_state_dict(self, state, prefix, *args):
        state[prefix + "a"] = state[prefix + "a"].t().contiguous().t() * 2
        super()._load_from_state_dict(state, prefix, *args)


def test_what_a_post_hook_of_a_refused_plan_keeps_has_its_values():
    kept: list[torch.Tensor] = []

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(300, 300))
            self.other = nn.Parameter(torch.zeros(2))
            self.register_load_state_dict_post_hook(lambda m, _: kept.append(m.weight.detach() * 2 + 1))

    with pytest.raises(wl.PlanError):
        wl.load(Keeps, {"weight": torch.ones(300, 300)})
    assert kept
    assert all(float(value.min()) >= 1.0 for value in kept)


class OwnLoad(nn.Linear):
    def load_state_dict(self, *args, **kwargs):
        raise AssertionError("somebody calls it")


class OwnWalk(nn.Linear):
    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)


@pytest.mark.parametrize("existing", [True, False])
def test_a_load_state_dict_that_is_not_called_is_named(existing, caplog):
    state = nn.Linear(2, 2).state_dict()

    def said(build, state=state):
        caplog.clear()
        with caplog.at_level("WARNING", "weightlift"):
            wl.plan(build() if existing else build, state).execute()
        return [record.getMessage() for record in caplog.records]

    def instance():
        module = nn.Linear(2, 2)
        module.load_state_dict = lambda *_: None
        return module

    (text,) = said(lambda: OwnLoad(2, 2))
    assert "wl.defer(build).materialize()" in text
    assert text.startswith("<mapping> into OwnLoad: OwnLoad.load_state_dict is not called")
    (text,) = said(instance)
    assert "Linear.load_state_dict is not called" in text
    assert said(lambda: OwnWalk(2, 2)) == said(lambda: nn.Linear(2, 2)) == []
    within = {f"0.{key}": value for key, value in state.items()}
    nn.Sequential(OwnLoad(2, 2)).load_state_dict(within)  # torch calls it as little
    assert said(lambda: nn.Sequential(OwnLoad(2, 2)), within) == []


# -- as tests/property/test_any_state_dict.py makes them up -----------------------------------------------------------


class Calling(nn.Module):
    """An override that does what it is given, before torch's own or after it."""

    def __init__(self, *, before=None, after=None, **tensors):
        super().__init__()
        self.before, self.after = before, after
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if self.before is not None:
            self.before(self, state, prefix)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if self.after is not None:
            self.after(self, state, prefix)


def test_a_tied_name_beside_a_loaded_one_is_not_missing_where_an_override_loads():
    def build():
        weight = nn.Parameter(torch.zeros(4))
        return Calling(a=weight, b=weight)

    for subject in (build, build()):
        assert torch.equal(wl.load(subject, {"a": torch.ones(4)}).b, torch.ones(4))


def test_what_an_override_itself_finds_missing_is_missing_though_nobody_would_look_for_it():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(4), persistent=False)

        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
            missing.append(prefix + "table")

    with pytest.raises(wl.PlanError, match="table"):
        wl.load(Looking, {})
    assert wl.plan(Looking, {}, strict=False).report.missing_keys == ("table",)


@pytest.mark.parametrize("kind", ["fitting", "scalar", "transient"])
def test_an_override_that_complains_of_a_shape_by_itself_is_heard(kind):
    class Complaining(nn.Module):
        def __init__(self):
            super().__init__()
            shape = () if kind == "scalar" else (4,)
            self.register_buffer("a", torch.zeros(shape), persistent=kind != "transient")

        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
            errors.append(f"size mismatch for {prefix}a: it is of another kind")

    state = {"a": torch.ones({"fitting": (4,), "scalar": (1,), "transient": (2,)}[kind])}
    with pytest.raises(RuntimeError, match="another kind"):
        Complaining().load_state_dict(state)
    with pytest.raises(wl.PlanError):
        wl.load(Complaining, state)


def test_a_key_that_a_hook_adds_for_elsewhere_is_not_unexpected():
    def build():
        module = nn.Sequential(nn.Linear(2, 2))
        module[0]._register_load_state_dict_pre_hook(lambda state, *args: state.update(elsewhere=torch.ones(1)))
        return module

    both_ways(build, state_of(build()))


def test_what_hooks_do_to_a_parameter_beside_its_value():
    def freeze(module, state, prefix):
        module.a.requires_grad_(False)
        module.a.origin = "a checkpoint"

    def build():
        return Calling(before=freeze, a=nn.Parameter(torch.zeros(4)))

    _, results = both_ways(build, {"a": torch.ones(4)})
    assert [(got.a.requires_grad, got.a.origin) for got in results] == [(False, "a checkpoint")] * 2
    module = build()
    wl.plan(module, {"a": torch.ones(4)})
    assert module.a.requires_grad and not hasattr(module.a, "origin")


@pytest.mark.parametrize("state", [{"b": torch.ones(4)}, {"a": torch.ones(4), "b": torch.full((4,), 2.0)}])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_memory_that_a_hook_parts_from_another_tensor(state, dtype):
    def part(module, state, prefix):
        module.b.data = torch.zeros(4)

    def build():
        a = nn.Parameter(torch.arange(4.0))
        return Calling(before=part, a=a, b=nn.Parameter(a.detach()))

    want = build()
    want.load_state_dict(state, strict=False)
    for subject in (build, build()):
        got = wl.load(subject, state, strict=False, dtype=dtype)
        assert torch.equal(got.a, want.a.to(got.a.dtype)) and torch.equal(got.b, want.b.to(got.a.dtype))
        assert got.a.untyped_storage().data_ptr() != got.b.untyped_storage().data_ptr()


@pytest.mark.parametrize("existing", [True, False])
def test_a_hook_that_casts_tensors_of_one_memory_parts_them(existing):
    def build():
        a = nn.Parameter(torch.arange(4.0))
        part = nn.Module()
        part.b = nn.Parameter(a.detach())
        return Calling(before=lambda module, *args: module.double(), a=a, part=part)

    got = wl.load(build() if existing else build, {"a": torch.ones(4), "part.b": torch.ones(4)})
    assert got.a.dtype == got.part.b.dtype == torch.float64
    assert got.a.untyped_storage().data_ptr() != got.part.b.untyped_storage().data_ptr()


def test_a_tensor_held_aside_keeps_its_value_when_a_hook_gives_its_parameter_new_memory():
    def grow(module, state, prefix):
        module.a.data = torch.zeros(state[prefix + "a"].shape)

    def build():
        module = Calling(before=grow, a=nn.Parameter(torch.arange(4.0)))
        module.held = [module.a.detach()]
        return module

    got = wl.load(build, {"a": torch.ones(6)})
    assert torch.equal(got.a, torch.ones(6)) and torch.equal(got.held[0], torch.arange(4.0))


def test_an_empty_tensor_that_a_hook_casts():
    def build():
        return Calling(before=lambda module, *args: module.double(), a=nn.Parameter(torch.zeros(0, 4)))

    for subject in (build, build()):
        assert wl.load(subject, {}, strict=False).a.dtype == torch.float64


@pytest.mark.parametrize("view", [False, True])
def test_a_hook_that_writes_into_what_another_module_has_loaded(view):
    """It is seen in the memory that both have, also where the hook's own name for it is gone in the end."""

    def write(module, state, prefix):
        with torch.no_grad():
            module.b.zero_()
        del module.b

    def build():
        root = nn.Module()
        root.a = nn.Parameter(torch.arange(4.0))
        root.part = Calling(before=write)
        if view:
            root.part.register_buffer("b", root.a.detach()[1:])
        else:
            root.part.b = root.a
        return root

    both_ways(build, {"a": torch.ones(4)})


def test_a_hook_that_reads_what_a_tied_name_has_loaded():
    def add(module, state, prefix):
        state[prefix + "c"] = module.b.detach() + 1

    def build():
        root = nn.Module()
        root.a = nn.Parameter(torch.arange(4.0))
        root.part = Calling(before=add, b=root.a, c=nn.Parameter(torch.zeros(4)))
        return root

    state = {"a": torch.ones(4), "part.b": torch.ones(4)}
    both_ways(build, state)


def test_a_value_stays_where_the_name_that_it_came_under_goes():
    def gone(module, state, prefix):
        del module.b

    def build():
        root = nn.Module()
        root.a = nn.Parameter(torch.arange(4.0))
        root.part = Calling(after=gone, b=root.a)
        return root

    both_ways(build, {"part.b": torch.ones(4)}, strict=False)


def test_post_hooks_are_told_names_in_the_order_of_the_checkpoint():
    told = []

    def build():
        module = nn.Linear(2, 2)
        module.register_load_state_dict_post_hook(lambda module, keys: told.append(list(keys.unexpected_keys)))
        return module

    state = OrderedDict({"part.x": torch.ones(1), "y": torch.ones(1)}, **nn.Linear(2, 2).state_dict())
    build().load_state_dict(state, strict=False)
    wl.load(build, state, strict=False)
    assert told == [["part.x", "y"]] * 2


def test_a_part_that_was_taken_off_is_not_missed_with_or_without_hooks():
    def build():
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        module[1] = None
        return module

    state = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    both_ways(build, state)
    assert wl.plan(build, state).report.unexpected_keys == ()


def test_a_parameter_that_is_pointed_at_the_checkpoints_value_and_then_loaded():
    def point(module, state, prefix):
        module.a.data = state[prefix + "a"]

    both_ways(lambda: Calling(before=point, a=nn.Parameter(torch.zeros(4))), {"a": torch.ones(4)})


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "more": torch.zeros(1)}])
def test_a_refused_plan_says_that_load_state_dict_is_not_called(state):
    with pytest.raises(wl.PlanError) as caught:
        wl.load(lambda: OwnLoad(2, 2), {**state, "other": torch.zeros(1)})
    assert str(caught.value).count("OwnLoad.load_state_dict is not called") == 1
    assert "wl.defer(build).materialize()" in str(caught.value)
    with pytest.raises(wl.PlanError) as caught:
        wl.load(lambda: nn.Linear(2, 2), {**state, "other": torch.zeros(1)})
    assert "is not called" not in str(caught.value)
