"""State-dict hooks mean here what they mean to ``load_state_dict``: every case is compared with torch's own load."""

import copy
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import weightlift as wl


def everything(module):
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def randomised(module, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


def state_of(module):
    return OrderedDict((name, tensor.clone()) for name, tensor in module.state_dict().items())


def file_of(tmp_path, state, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        torch.save(state, path)
    else:
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def torch_load(path):
    return torch.load(path, weights_only=True) if str(path).endswith("pt") else load_file(path)


def agree(tmp_path, build, state, *, kinds=("safetensors", "pt"), ways=("callable", "existing", "not deferred")):
    """wl.load gives what load_state_dict gives (values too where neither loads them), or both refuse."""
    plan = None
    for kind in kinds:
        path = file_of(tmp_path, state, kind)
        for way in ways:
            torch.manual_seed(0)
            want = build()
            torch.manual_seed(0)
            subject = build() if way == "existing" else build
            torch.manual_seed(0)
            try:
                want.load_state_dict(torch_load(path))
            except RuntimeError as error:
                with pytest.raises(wl.PlanError) as caught:
                    wl.load(subject, path, defer=way != "not deferred")
                agree.errors = (str(error), str(caught.value))
                continue
            got = wl.load(subject, path, defer=way != "not deferred")
            assert everything(got) == everything(want), (kind, way)
            plan = wl.plan(build, path)
    return plan


class Renaming(nn.Module):
    def __init__(self):
        super().__init__()
        self.new = nn.Linear(3, 3)
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state, prefix, *args):
        for key in list(state):
            if key.startswith(prefix + "old."):
                state[key.replace(prefix + "old.", prefix + "new.", 1)] = state.pop(key)


def renamed_state(prefix=""):
    return OrderedDict({prefix + "old.weight": torch.randn(3, 3), prefix + "old.bias": torch.randn(3)})


def test_a_pre_hook_that_renames(tmp_path):
    plan = agree(tmp_path, Renaming, renamed_state())
    assert plan.decisions.early_keys == ()
    assert {row.fqn: row.offer.key for row in plan.decisions.rows} == {
        "new.weight": "old.weight", "new.bias": "old.bias"}  # fmt: skip
    assert "old.weight" in str(plan)


def test_a_pre_hook_that_renames_below_others(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(Renaming(), nn.ReLU()), Renaming())

    state = {"0.weight": torch.randn(2, 2), "0.bias": torch.randn(2), **renamed_state("1.0."), **renamed_state("2.")}
    plan = agree(tmp_path, build, OrderedDict(state))
    assert plan.decisions.early_keys == () and plan.report.unexpected_keys == ()


def test_a_pre_hook_after_key_mapping(tmp_path):
    path = file_of(tmp_path, renamed_state("model."), "safetensors")
    got = wl.load(Renaming, path, key_mapping={r"^model\.": ""})
    assert torch.equal(got.new.weight, load_file(path)["model.old.weight"])


def test_what_a_hook_leaves_over_is_unexpected(tmp_path):
    state = renamed_state()
    state["other"] = torch.zeros(1)
    agree(tmp_path, Renaming, state)
    assert all("other" in text for text in agree.errors)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self._register_load_state_dict_pre_hook(self.split)

    def split(self, state, prefix, *args):
        for part in ("weight", "bias"):
            if (fused := state.pop(f"{prefix}qkv.{part}", None)) is not None:
                for name, value in zip("qkv", fused.chunk(3)):
                    state[f"{prefix}{name}.{part}"] = value


def test_a_pre_hook_that_splits(tmp_path):
    state = OrderedDict({"0.qkv.weight": torch.randn(12, 4), "0.qkv.bias": torch.randn(12)})
    state |= {"1.weight": torch.randn(2, 4), "1.bias": torch.randn(2)}
    plan = agree(tmp_path, lambda: nn.Sequential(Attention(), nn.Linear(4, 2)), state)
    assert sorted(plan.decisions.early_keys) == ["0.qkv.bias", "0.qkv.weight"]
    assert "0.qkv.weight" in str(plan) and "early" in str(plan)
    assert plan.problems == () and plan.report.unexpected_keys == ()


def test_split_values_are_independent_of_each_other_and_of_the_file(tmp_path):
    path = file_of(tmp_path, {"qkv.weight": torch.randn(12, 4), "qkv.bias": torch.randn(12)}, "safetensors")
    before = path.read_bytes()
    got = wl.load(Attention, path)
    with torch.no_grad():
        got.q.weight.fill_(9)
    assert path.read_bytes() == before and torch.equal(got.k.weight, load_file(path)["qkv.weight"][4:8])
    assert got.q.weight.untyped_storage().nbytes() == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.t(),
        lambda t: t.reshape(-1),
        lambda t: t.reshape(2, 8).clone(),
        lambda t: t.unsqueeze(0),
        lambda t: t.view(torch.int32),
        lambda t: t * 2,
        lambda t: t.mul_(2),
        lambda t: t.clone(),
        lambda t: t.half(),
        lambda t: t.detach(),
        lambda t: t.to(torch.float32),
        lambda t: t[:],
        lambda t: t.flip(0),
        lambda t: t + t.max().item(),
        lambda t: torch.from_numpy(t.numpy() * 2),
        lambda t: torch.tensor(t.tolist()),
        lambda t: torch.tensor([float(row.sum()) for row in t]),
        lambda t: nn.Parameter(t),
    ],
    ids=["t", "reshape", "clone-of-reshape", "unsqueeze", "view-dtype", "mul", "mul_", "clone", "half", "detach",
         "to", "slice", "flip", "item", "numpy", "tolist", "rows", "parameter"],
)  # fmt: skip
def test_a_pre_hook_that_changes_a_value(tmp_path, change):
    source = torch.randn(4, 4)
    result = change(source.clone())

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Buffer(torch.zeros(result.shape, dtype=result.dtype))
            self._register_load_state_dict_pre_hook(self.hook)

        @staticmethod
        def hook(state, prefix, *args):
            state[prefix + "x"] = change(state.pop(prefix + "y"))

    agree(tmp_path, Changing, OrderedDict(y=source))


def test_one_key_given_to_two_names(tmp_path):
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
            self._register_load_state_dict_pre_hook(self.hook)

        @staticmethod
        def hook(state, prefix, *args):
            state[prefix + "a"] = state[prefix + "b"] = state.pop(prefix + "both")

    agree(tmp_path, Doubling, OrderedDict(both=torch.randn(3)))
    got = wl.load(Doubling, file_of(tmp_path, {"both": torch.ones(3)}, "safetensors"))
    with torch.no_grad():
        got.a.add_(1)
    assert torch.equal(got.b, torch.ones(3))


def test_a_pre_hook_that_fills_in_the_modules_own_value(tmp_path):
    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.full((3,), 7.0))
            self.b = nn.Parameter(torch.arange(3.0))
            self.register_load_state_dict_pre_hook(self.hook)

        @staticmethod
        def hook(module, state, prefix, *args):
            state.setdefault(prefix + "a", module.a.detach())
            state.setdefault(prefix + "b", module.b.detach() * 2)

    # A .pt file without a tensor is refused.
    agree(tmp_path, Filling, OrderedDict(), kinds=["safetensors"])


def test_an_override_that_fills_in_the_modules_own_value(tmp_path):
    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.full((3,), 7.0))
            self.b = nn.Parameter(torch.arange(3.0))

        def _load_from_state_dict(self, state, prefix, *args):
            state.setdefault(prefix + "a", self.a.detach().clone())
            state.setdefault(prefix + "b", self.b.detach() * 2)
            super()._load_from_state_dict(state, prefix, *args)

    agree(tmp_path, Filling, OrderedDict(), kinds=["safetensors"])


def test_a_pre_hook_that_fits_the_module_to_the_checkpoint(tmp_path):
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("queue", torch.zeros(2))
            self.register_load_state_dict_pre_hook(self.hook)

        @staticmethod
        def hook(module, state, prefix, *args):
            module.queue = torch.zeros(state[prefix + "queue"].shape)

    agree(tmp_path, Growing, OrderedDict(queue=torch.randn(5)))


@pytest.mark.parametrize("how", ["new", "resize_", "data"])
def test_an_override_that_fits_the_module_to_the_checkpoint(tmp_path, how):
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("queue", torch.zeros(2))

        def _load_from_state_dict(self, state, prefix, *args):
            value = state.get(prefix + "queue")
            if value is not None and value.shape != self.queue.shape:
                if how == "new":
                    self.queue = torch.zeros_like(value)
                elif how == "resize_":
                    self.queue.resize_(value.shape)
                else:
                    self.queue.data = torch.empty(value.shape)
            super()._load_from_state_dict(state, prefix, *args)

    agree(tmp_path, Growing, OrderedDict(queue=torch.randn(5)))


def test_an_override_that_sets_an_attribute(tmp_path):
    class Versioned(nn.Linear):
        loaded = 0

        def _load_from_state_dict(self, state, prefix, *args):
            self.loaded = 1 + int(state.pop(prefix + "version"))
            super()._load_from_state_dict(state, prefix, *args)

    path = file_of(tmp_path, {"weight": torch.ones(2, 2), "bias": torch.ones(2), "version": torch.tensor(4)}, "pt")
    got = wl.load(lambda: Versioned(2, 2), path)
    assert got.loaded == 5


def test_planning_does_not_write_into_the_children_of_an_override(tmp_path):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(2, 2)

        def _load_from_state_dict(self, state, prefix, *args):
            if prefix + "w" in state:
                self.child.weight.data.copy_(state.pop(prefix + "w"))
                state[prefix + "child.weight"] = self.child.weight.detach().clone()
            super()._load_from_state_dict(state, prefix, *args)

    state = OrderedDict({"w": torch.full((2, 2), 3.0), "child.bias": torch.ones(2)})
    module = Parent()
    before = everything(module)
    wl.plan(module, state)
    assert everything(module) == before


def test_filling_in_keeps_an_existing_modules_values():
    class Filling(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            state.setdefault(prefix + "bias", self.bias.detach().clone())
            super()._load_from_state_dict(state, prefix, *args)

    module = Filling(3, 3)
    before = module.bias.detach().clone()
    wl.load(module, {"weight": torch.ones(3, 3)})
    assert torch.equal(module.bias, before)


def test_hooks_see_the_metadata_of_the_state_dict(tmp_path):
    seen = []

    class Asking(nn.Linear):
        _version = 3

        def __init__(self):
            super().__init__(2, 2)
            self._register_load_state_dict_pre_hook(self.hook)

        @staticmethod
        def hook(state, prefix, metadata, *args):
            seen.append((metadata.get("version"), getattr(state, "_metadata", {}).get("", {}).get("version")))

    path = file_of(tmp_path, Asking().state_dict(), "pt")
    Asking().load_state_dict(torch_load(path))
    wl.load(Asking, path)
    wl.load(Asking, Asking().state_dict())
    assert seen == [(3, 3)] * 3


def test_a_hook_of_a_module_under_two_names(tmp_path):
    def build():
        module = nn.Module()
        module.a = Renaming()
        module.b = module.a
        return module

    state = renamed_state("a.")
    agree(tmp_path, build, OrderedDict({**state, **{"b" + name[1:]: value for name, value in state.items()}}))


def test_a_hook_inside_a_deferred_module_with_a_dtype(tmp_path):
    path = file_of(tmp_path, {"qkv.weight": torch.randn(12, 4), "qkv.bias": torch.randn(12)}, "safetensors")
    for dtype in (torch.bfloat16, {"q.*": torch.float16}):
        got = wl.load(Attention, path, dtype=dtype)
        want = load_file(path)["qkv.weight"][:4]
        assert torch.equal(got.q.weight, want.to(got.q.weight.dtype)) and got.q.weight.dtype != torch.float32


# -- torch's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.LazyBatchNorm1d])
def test_old_batch_norm(tmp_path, kind, layer):
    state = state_of(randomised(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))))
    del state["1.num_batches_tracked"]

    def build():
        return nn.Sequential(nn.Linear(3, 3), layer(*([3] if layer is nn.BatchNorm1d else [])))

    agree(tmp_path, build, state, kinds=[kind])


def test_old_batch_norm_keeps_an_existing_count(tmp_path):
    state = state_of(randomised(nn.BatchNorm1d(3)))
    del state["num_batches_tracked"]
    module = nn.BatchNorm1d(3)
    module.num_batches_tracked.fill_(17)
    want = copy.deepcopy(module)
    want.load_state_dict(state)
    wl.load(module, state)
    assert everything(module) == everything(want)


def test_new_batch_norm_misses_its_count(tmp_path):
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    assert state._metadata[""]["version"] == 2
    agree(tmp_path, lambda: nn.BatchNorm1d(3), state, kinds=["pt"])
    assert all("num_batches_tracked" in text for text in agree.errors)
    with pytest.raises(wl.PlanError, match="num_batches_tracked"):
        wl.load(lambda: nn.BatchNorm1d(3), state)


def test_old_names_of_weight_norm(tmp_path):
    old = weight_norm(nn.Linear(4, 3))
    state = state_of(randomised(old))
    assert {"weight_g", "weight_v"} <= set(state)
    plan = agree(tmp_path, lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
                 OrderedDict((f"0.{k}", v) for k, v in state.items()))  # fmt: skip
    assert plan.decisions.early_keys == ()
    assert sorted(row.offer.key for row in plan.decisions.rows) == ["0.bias", "0.weight_g", "0.weight_v"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 3)),
        lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
        lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
        lambda: spectral_norm(nn.Linear(4, 3)),
        lambda: weight_norm(nn.Linear(4, 3)),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.LSTM(3, 4, 2),
        lambda: nn.BatchNorm2d(3, affine=False),
        lambda: nn.InstanceNorm1d(3, track_running_stats=True),
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
    ],
    ids=["weight_norm", "orthogonal", "spectral", "old-spectral", "old-weight_norm", "mha", "lstm", "bn", "in", "enc"],
)
def test_torch_modules_with_hooks(tmp_path, make):
    agree(tmp_path, make, state_of(randomised(make())))


def test_spectral_norm_of_before_its_first_version(tmp_path):
    state = state_of(randomised(spectral_norm(nn.Linear(4, 3))))
    state["weight"] = state["weight_orig"] / 2
    del state["weight_v"]
    # weight_v is solved for from weight, weight_orig and weight_u.
    agree(tmp_path, lambda: spectral_norm(nn.Linear(4, 3)), state)


def test_observers_that_resize(tmp_path):
    from torch.ao.quantization import PerChannelMinMaxObserver

    observer = PerChannelMinMaxObserver()
    observer(torch.randn(4, 5))
    agree(tmp_path, PerChannelMinMaxObserver, state_of(observer), kinds=["safetensors"])


# -- overrides --------------------------------------------------------------------------------------------------------


class Override(nn.Module):
    """``load`` gets what ``_load_from_state_dict`` gets."""

    def __init__(self, load):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 3), 0.25))
        self.bias = nn.Parameter(torch.zeros(3))
        self.load = load

    def parent_load(self, *args):
        super()._load_from_state_dict(*args)

    def _load_from_state_dict(self, *args):
        self.load(self, *args)


def rename(self, state, prefix, *args):
    if prefix + "kernel" in state:
        state[prefix + "weight"] = state.pop(prefix + "kernel")
    self.parent_load(state, prefix, *args)


def transpose(self, state, prefix, *args):
    state[prefix + "weight"] = state.pop(prefix + "kernel").t()
    self.parent_load(state, prefix, *args)


def ignore(self, *args):
    pass


def write_itself(self, state, prefix, *args):
    with torch.no_grad():
        self.weight.copy_(state[prefix + "weight"] * 2)
        self.bias.copy_(state[prefix + "bias"])


def replace_data(self, state, prefix, *args):
    self.weight.data = state[prefix + "weight"].clone() + 1
    self.bias.data = state[prefix + "bias"]


def write_a_part(self, state, prefix, *args):
    with torch.no_grad():
        self.weight[0].copy_(state[prefix + "weight"][1])
        self.bias.fill_(3)


def forgive_unexpected(self, state, prefix, meta, strict, missing, unexpected, errors):
    self.parent_load(state, prefix, meta, strict, missing, unexpected, errors)
    unexpected[:] = [key for key in unexpected if not key.endswith("mask")]


def forgive_missing(self, state, prefix, meta, strict, missing, unexpected, errors):
    self.parent_load(state, prefix, meta, strict, missing, unexpected, errors)
    missing[:] = [key for key in missing if not key.endswith("bias")]


def complain(self, state, prefix, meta, strict, missing, unexpected, errors):
    self.parent_load(state, prefix, meta, strict, missing, unexpected, errors)
    errors.append("this checkpoint is too old")


def report_missing(self, state, prefix, meta, strict, missing, unexpected, errors):
    self.parent_load(state, prefix, meta, strict, missing, unexpected, errors)
    missing.append(prefix + "of my own")


def report_unexpected(self, state, prefix, meta, strict, missing, unexpected, errors):
    self.parent_load(state, prefix, meta, strict, missing, unexpected, errors)
    unexpected.append(prefix + "not wanted")


W, B = torch.randn(2, 3), torch.randn(3)
CASES = {
    "rename": (rename, {"kernel": W, "bias": B}),
    "transpose": (transpose, {"kernel": W.t().contiguous(), "bias": B}),
    "ignore": (ignore, {"weight": W, "bias": B}),
    "ignore nothing": (ignore, {}),
    "ignore others": (ignore, {"weight": W, "bias": B, "other": B}),
    "write itself": (write_itself, {"weight": W, "bias": B}),
    "replace data": (replace_data, {"weight": W, "bias": B}),
    "write a part": (write_a_part, {"weight": W, "bias": B}),
    "forgive unexpected": (forgive_unexpected, {"weight": W, "bias": B, "mask": B}),
    "unexpected": (forgive_unexpected, {"weight": W, "bias": B, "other": B}),
    "forgive missing": (forgive_missing, {"weight": W}),
    "missing": (forgive_missing, {"bias": B}),
    "complain": (complain, {"weight": W, "bias": B}),
    "report missing": (report_missing, {"weight": W, "bias": B}),
    "report unexpected": (report_unexpected, {"weight": W, "bias": B}),
    "mismatch": (rename, {"kernel": torch.zeros(3, 3), "bias": B}),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_an_override(tmp_path, case, nested):
    load, state = CASES[case]

    def build():
        return nn.Sequential(nn.Identity(), Override(load)) if nested else Override(load)

    agree.errors = ("", "")
    kinds = ["safetensors", "pt"] if state else ["safetensors"]  # a .pt file without a tensor is refused
    state = OrderedDict((("1." if nested else "") + k, v.clone()) for k, v in state.items())
    agree(tmp_path, build, state, kinds=kinds)
    if case == "complain":
        assert all("this checkpoint is too old" in text for text in agree.errors)


def test_hook_errors_leave_the_module_alone():
    module = Override(complain)
    before = everything(module)
    with pytest.raises(wl.PlanError, match="too old"):
        wl.load(module, {"weight": W, "bias": B}, strict=False)
    assert everything(module) == before


def test_an_exception_of_a_hook_reaches_the_caller():
    def fail(self, *args):
        raise ZeroDivisionError("mine")

    module = Override(fail)
    with pytest.raises(ZeroDivisionError, match="mine"):
        wl.load(module, {"weight": W, "bias": B})


# -- after the load ---------------------------------------------------------------------------------------------------


def test_post_hooks_run_as_torch_runs_them():
    def build(calls):
        module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        for name, child in module.named_modules():
            child.register_load_state_dict_post_hook(
                lambda m, keys, name=name: calls.append(
                    (name, type(m).__name__, float(next(m.parameters(), torch.zeros(1)).sum()))
                )
            )
        return module

    state = {name: torch.full_like(t, 2.0) for name, t in build([]).state_dict().items()}
    want, got, filled = [], [], []
    build(want).load_state_dict(state)
    wl.load(lambda: build(got), state)
    wl.load(build(filled), state)
    assert sorted(got) == sorted(filled) == sorted(want)
    assert got[-1] == want[-1]
    assert got == want and filled == want


def test_post_hooks_get_the_keys():
    def build(calls):
        module = nn.Linear(2, 2)
        module.register_load_state_dict_post_hook(
            lambda m, keys: calls.append((list(keys.missing_keys), list(keys.unexpected_keys)))
        )
        return module

    state = {"weight": torch.ones(2, 2), "more": torch.ones(1)}
    want, got = [], []
    build(want).load_state_dict(state, strict=False)
    wl.load(lambda: build(got), state, strict=False)
    assert got == want == [(["bias"], ["more"])]


def test_a_post_hook_that_forgives():
    class Forgiving(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())

    state = {"weight": torch.ones(2, 2)}
    Forgiving().load_state_dict(state)
    assert torch.equal(wl.load(Forgiving, state).weight, torch.ones(2, 2))


# -- extra state ------------------------------------------------------------------------------------------------------


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.note = None

    def get_extra_state(self):
        return {"note": self.note, "n": [1, 2]}

    def set_extra_state(self, state):
        self.note = state["note"]


class TensorExtra(Extra):
    def get_extra_state(self):
        return self.note

    def set_extra_state(self, state):
        self.note = state


def noted(build, note):
    module = build()
    for child in module.modules():
        if isinstance(child, Extra):
            child.note = note
    return module


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("existing", [True, False])
def test_extra_state(tmp_path, nested, existing):
    def build():
        return nn.Sequential(Extra(), nn.ReLU(), Extra()) if nested else Extra()

    module = noted(build, "hello")
    path = file_of(tmp_path, module.state_dict(), "pt")
    got = wl.load(build() if existing else build, path)
    assert everything(got) == everything(module)
    assert [m.note for m in got.modules() if isinstance(m, Extra)] == ["hello"] * (2 if nested else 1)


def test_extra_state_beside_hooks(tmp_path):
    def build():
        return nn.ModuleDict({"a": Extra(), "b": Renaming(), "c": nn.BatchNorm1d(2)})

    module = noted(build, "hello")
    state = module.state_dict()
    state["b.old.weight"], state["b.old.bias"] = state.pop("b.new.weight"), state.pop("b.new.bias")
    got = wl.load(build, file_of(tmp_path, state, "pt"))
    assert got["a"].note == "hello" and everything(got) == everything(module)


@pytest.mark.parametrize("kind", ["pt", "safetensors", "mapping"])
def test_extra_state_that_is_a_tensor(tmp_path, kind):
    module = noted(TensorExtra, torch.arange(3))
    state = module.state_dict()
    want = TensorExtra()
    want.load_state_dict(state)
    assert torch.equal(want.note, torch.arange(3))
    source = state if kind == "mapping" else file_of(tmp_path, state, kind)
    got = wl.load(TensorExtra, source)
    assert torch.equal(got.note, torch.arange(3))


def test_missing_extra_state_is_refused_under_strict(tmp_path):
    state = Extra().lin.state_dict(prefix="lin.")
    with pytest.raises(wl.PlanError, match="_extra_state"):
        wl.load(Extra, state)
    assert wl.load(Extra, state, strict=False).note is None


def test_unexpected_extra_state_is_refused_as_torch_refuses_it(tmp_path):
    path = file_of(tmp_path, noted(Extra, "x").state_dict(), "pt")

    def build():
        return nn.ModuleDict({"lin": nn.Linear(2, 2)})

    with pytest.raises(RuntimeError, match="_extra_state"):
        build().load_state_dict(torch_load(path))
    with pytest.raises(wl.PlanError, match="_extra_state"):
        wl.load(build, path)


def test_values_that_are_no_tensors_are_unexpected(tmp_path):
    state = OrderedDict(nn.Linear(2, 2).state_dict(), epoch=3)
    path = file_of(tmp_path, state, "pt")
    with pytest.raises(RuntimeError, match="epoch"):
        nn.Linear(2, 2).load_state_dict(torch_load(path))
    with pytest.raises(wl.PlanError, match="epoch"):
        wl.load(lambda: nn.Linear(2, 2), path)


def test_extra_state_goes_through_key_mapping(tmp_path):
    state = {f"model.{name}": value for name, value in noted(Extra, "hello").state_dict().items()}
    got = wl.load(Extra, file_of(tmp_path, state, "pt"), key_mapping={r"^model\.": ""})
    assert got.note == "hello"


# -- lazy modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_lazy_linear(tmp_path, existing, dtype):
    def build():
        return nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyConv1d(2, 3))

    state = OrderedDict(state_of(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Conv1d(4, 2, 3))))
    path = file_of(tmp_path, state, "safetensors")
    got = wl.load(build() if existing else build, path, dtype=dtype)
    want = build()
    want.load_state_dict(load_file(path))
    if dtype is not None:
        want = want.to(dtype)
    assert everything(got) == everything(want)
    assert [type(p) for p in got.parameters()] == [nn.Parameter] * 4
    x = torch.ones(2, 5, dtype=dtype)
    assert torch.equal(got[0](x), want[0](x)) and type(got[0]) is type(want[0])


def test_lazy_without_its_weight(tmp_path):
    with pytest.raises(wl.PlanError, match="weight"):
        wl.load(lambda: nn.LazyLinear(3), {"bias": torch.zeros(3)})
    got = wl.load(lambda: nn.LazyLinear(3), {"bias": torch.ones(3)}, strict=False)
    want = nn.LazyLinear(3)
    want.load_state_dict({"bias": torch.ones(3)}, strict=False)
    assert got.has_uninitialized_params() and torch.equal(got.bias, want.bias)


LYING = {
    "rows": torch.arange(24.0).reshape(4, 6),
    "transposed": torch.arange(24.0).reshape(6, 4).t(),
    "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "every second": torch.arange(48.0).reshape(4, 12)[:, ::2],
    "repeated": torch.arange(4.0)[:, None].expand(4, 6),
}


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 2, 6), (6, 4), (4, 3, 2), (1, 24)])
@pytest.mark.parametrize("lies", LYING)
def test_a_hook_reshapes_what_lies_in_no_rows(tmp_path, lies, shape):
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))

        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].reshape(shape)
            super()._load_from_state_dict(state_dict, prefix, *args)

    state = {"weight": LYING[lies]}
    wanted = Reshaping()
    wanted.load_state_dict(state)
    torch.save(state, tmp_path / "x.pt")
    for source in (tmp_path / "x.pt", state):
        assert torch.equal(wl.load(Reshaping, source).weight, wanted.weight)
        existing = Reshaping()
        wl.load(existing, source)
        assert torch.equal(existing.weight, wanted.weight)
    plan = wl.plan(Reshaping, {"weight": LYING["transposed"]})
    assert plan.decisions.early_keys == (("weight",) if shape in [(24,), (6, 4), (1, 24)] else ())
