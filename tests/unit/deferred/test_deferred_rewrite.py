"""Stand-ins, doubles, and the rehearsal of ``load_state_dict`` that is made of them."""

import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from weightlift.deferred.doubles import Doubles
from weightlift.deferred.inventory import Inventory
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.rewrite import rewrite
from weightlift.deferred.rewritten import State
from weightlift.deferred.stand_ins import OWN, Offered, StandIns

VALUES = {"x": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}


@pytest.fixture
def stand_ins():
    recorder = Recorder(seed=0)
    with torch.no_grad(), recorder.resumed():
        yield StandIns(recorder, VALUES.__getitem__, lambda tensor: None)


def offered(stand_ins, name="x"):
    return stand_ins.offered(name, tuple(VALUES[name].shape), VALUES[name].dtype)


@pytest.mark.parametrize(
    "change, shape",
    [
        (lambda t: t, (2, 3)), (lambda t: t.detach(), (2, 3)), (lambda t: nn.Parameter(t), (2, 3)),
        (lambda t: t.reshape(3, 2), (3, 2)), (lambda t: torch.empty(2, 3).copy_(t), (2, 3)),
        (lambda t: torch.empty(2, 3, dtype=torch.half).copy_(t), (2, 3)),
        (lambda t: t.t(), None), (lambda t: t.view(torch.int32), None), (lambda t: t[:1], None),
        (lambda t: t.mul_(2), None), (lambda t: t + 1, None), (lambda t: torch.empty(4, 2, 3).copy_(t), None),
        (lambda t: torch.empty(2, 3).copy_(t.mul_(2)), None), (lambda t: torch.empty(2, 3).copy_(t).add_(1), None),
    ],
)  # fmt: skip
def test_where_a_value_comes_from(stand_ins, change, shape):
    made = change(offered(stand_ins))
    assert stand_ins.origin(made) == (None if shape is None else Offered("x", shape))
    assert stand_ins.early == []
    assert torch.equal(stand_ins.value(made, "the test"), change(VALUES["x"].clone()))
    assert stand_ins.early == ["x"]


def test_a_source_that_is_changed_after_it_was_copied(stand_ins):
    source = offered(stand_ins)
    made = torch.empty(2, 3).copy_(source)
    source.zero_()
    assert stand_ins.origin(made) == Offered("x", (2, 3))
    assert torch.equal(stand_ins.value(made, "the test"), VALUES["x"])


def test_a_tensor_of_the_modules(stand_ins):
    own = torch.arange(6.0).reshape(2, 3).t()
    double, view = stand_ins.own(own), stand_ins.own(own[1:])
    assert double.stride() == own.stride() and stand_ins.origin(double) is None
    mark = stand_ins.mark(double)
    assert stand_ins.origin(double.copy_(double)) is OWN and stand_ins.mark(double) != mark
    view.fill_(9)
    assert torch.equal(stand_ins.value(double, "")[1:], torch.full((2, 2), 9.0)) and own[1, 0] == 1


@pytest.mark.parametrize(
    "tensor",
    [
        nn.Parameter(torch.ones(2, 3), requires_grad=False), torch.ones(2, 0), torch.tensor(4),
        torch.ones(2, 3, dtype=torch.complex64).conj(), torch.ones(10)[3:5], torch.ones(2, 2).to_sparse(),
        torch.ones(2, requires_grad=True),
    ],
    ids=["parameter", "empty", "scalar", "conjugate", "part", "sparse", "leaf"],
)  # fmt: skip
def test_kinds_of_own_tensors(stand_ins, tensor):
    double = stand_ins.own(tensor)
    assert type(double) is type(tensor) and double.requires_grad == tensor.requires_grad
    got = stand_ins.value(double, "") if tensor.layout is torch.strided else double
    assert torch.equal(got.to_dense(), tensor.detach().to_dense()) and double is not tensor


# -- doubles ----------------------------------------------------------------------------------------------------------


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Linear(2, 2)
        self.names = ["a", {"b": self.child}]
        self.count = 0
        self.bound = self.method
        self.elsewhere = object()

    def method(self):
        self.count += 1
        return self


def doubled(stand_ins, module):
    doubles = Doubles(stand_ins, lambda module, state: None)
    return doubles, doubles.of(module)


def test_a_double_is_apart_from_its_module(stand_ins):
    module = Parent()
    doubles, double = doubled(stand_ins, module)
    assert type(double) is Parent and double.child is not module.child and double.child.weight.shape == (2, 2)
    assert double.names[1]["b"] is double.child and double.elsewhere is module.elsewhere
    assert double.bound() is double and (double.count, module.count) == (1, 0)
    double.names.append("c")
    double.child.weight.data.fill_(3)
    del double.elsewhere
    assert module.names == ["a", {"b": module.child}] and not (module.child.weight == 3).any()
    changes = doubles.changes()
    names = module.names
    for change in changes:
        change.apply()
    assert module.names is names == ["a", {"b": module.child}, "c"] and module.count == 1
    assert not hasattr(module, "elsewhere") and module.bound() is module


def test_nothing_done_is_nothing_to_do(stand_ins):
    doubles, _ = doubled(stand_ins, nn.Sequential(Parent(), nn.BatchNorm1d(2), nn.LazyLinear(3), nn.LSTM(2, 2)))
    assert doubles.changes() == ()


def test_doubles_do_not_outlive_the_rehearsal(stand_ins):
    doubles, double = doubled(stand_ins, Parent())
    tensor = weakref.ref(double.child.weight)
    doubles.dissolve()
    assert tensor() is None


# -- rewrite ----------------------------------------------------------------------------------------------------------


class Upgrading(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("n", torch.tensor(0))
        self.register_load_state_dict_pre_hook(self.hook)

    def hook(self, module, state, prefix, metadata, strict, missing, unexpected, errors):
        assert module is self
        state[prefix + "x"] = state.pop(prefix + "old")
        self.version = int(state[prefix + "n"])
        errors.append(f"metadata {metadata}")


def rehearsed(module, tensors, extras=None, metadata=None):
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    return rewrite(Inventory.of(module), State(shapes, tensors.__getitem__, extras or {}, metadata), None, 0)


def test_without_hooks_there_is_nothing_to_rehearse():
    assert rehearsed(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), {}) is None


def test_a_rehearsal_says_all_that_load_state_dict_would():
    module = nn.Sequential(Upgrading(), nn.Linear(3, 1))
    tensors = {"0.old": VALUES["x"], "0.n": VALUES["n"], "1.bias": torch.ones(1), "1.more": torch.ones(1)}
    done = rehearsed(module, tensors, {"step": 3, "1.weight": "no tensor"}, {"0": {"version": 7}})
    assert done.names == {"0.x": Offered("0.old", (2, 3)), "0.n": Offered("0.n", ()), "1.bias": Offered("1.bias", (1,))}
    assert (done.missing, done.early, done.values) == ([], ["0.n"], {})
    assert done.unexpected == [("step", "step"), ("1.more", "1.more")]
    assert done.not_tensors == {"1.weight": "no tensor"} and done.errors == ["metadata {'version': 7}"]
    assert not hasattr(module[0], "version") and torch.equal(module[0].x, torch.zeros(2, 3))
    assert [(change.target, change.name, change.value) for change in done.changes] == [(module[0], "version", 3)]


def test_a_rehearsal_reads_nothing_that_a_hook_does_not_look_at():
    class Refusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(3))

        def _load_from_state_dict(self, state, prefix, *args):
            assert state[prefix + "a"].shape == (3,) and state[prefix + "a"].is_floating_point()
            super()._load_from_state_dict(state, prefix, *args)

    def read(name):
        raise AssertionError(f"{name} was read")

    state = State({"a": ((3,), torch.float32)}, read, {}, None)
    done = rewrite(Inventory.of(Refusing()), state, None, 0)
    assert done.names == {"a": Offered("a", (3,))}


@pytest.mark.parametrize("at", ["", "0", "1", "1.0"])
def test_a_rehearsal_that_fails_reads_nothing_for_the_traceback(at):
    def fail(state, prefix, *_):
        raise ZeroDivisionError(prefix)

    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    module.get_submodule(at).register_load_state_dict_pre_hook(lambda _, *rest: fail(*rest))
    read = []
    state = State({name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}, read.append, {}, None)
    with pytest.raises(ZeroDivisionError, match=at):
        rewrite(Inventory.of(module), state, None, 0)
    assert read == []


def test_what_a_hook_makes_anew_is_in_the_inventory():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.zeros(2))

        def _load_from_state_dict(self, state, prefix, *args):
            self.register_buffer("b", torch.ones(4))
            self.a.resize_(state[prefix + "a"].shape)
            super()._load_from_state_dict(state, prefix, *args)

    module = Growing()
    done = rehearsed(module, OrderedDict(a=torch.ones(5)))
    assert [slot.fqn for slot in done.inventory.slots] == ["a", "b"] and "b" not in module._buffers
    assert done.inventory.slots[0].tensor is module.a and module.a.shape == (2,)
    assert done.refits["a"].shape == (5,) and done.refits["b"].shape == (4,)
    assert done.missing == ["b"] and torch.equal(done.values["b"], torch.ones(4))
