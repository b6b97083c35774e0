"""Loads within a constructor that is itself deferred: of parts of what is being built, and from tensors of it."""

import pytest
import torch
from torch import nn

import weightlift as wl

pytestmark = pytest.mark.filterwarnings("ignore")
SEVENS = {"weight": torch.full((3, 3), 7.0), "bias": torch.full((3,), 8.0)}


class Holder(nn.Module):
    """Built by a function that is handed it."""

    def __init__(self, body):
        super().__init__()
        body(self)


def built(body):
    """Ordinarily, and deferred and then initialised."""
    return Holder(body), wl.defer(lambda: Holder(body)).materialize()


def assert_alike(body):
    ordinary, deferred = built(body)
    expected, found = ordinary.state_dict(), deferred.state_dict()
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    return deferred


def test_a_part_that_its_constructor_loads_keeps_what_was_loaded():
    def body(module):
        module.part = nn.Linear(3, 3)
        wl.load(module.part, SEVENS)

    assert_alike(body)


def test_a_part_that_its_constructor_loads_in_part_is_initialised_otherwise():
    def body(module):
        module.part = nn.Linear(3, 3)
        nn.init.ones_(module.part.bias)
        wl.load(module.part, {"weight": SEVENS["weight"]}, strict=False)

    assert_alike(body)


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"dtype": torch.float64}])
@pytest.mark.parametrize("existing", [False, True])
def test_a_state_that_was_put_off_has_its_values_when_it_is_loaded(existing, options):
    def body(module):
        state = {"weight": torch.full((3, 3), 7.0), "bias": torch.arange(3) * torch.ones(3)}
        module.part = wl.load(nn.Linear(3, 3) if existing else lambda: nn.Linear(3, 3), state, **options)

    assert_alike(body)


def test_what_a_load_fills_is_read_as_it_was_by_calls_before_it():
    def body(module):
        module.part = nn.Linear(300, 300)
        nn.init.ones_(module.part.weight)
        module.register_buffer("before", module.part.weight.detach() * 3)
        wl.load(module.part, {"weight": torch.zeros(300, 300), "bias": torch.zeros(300)})
        module.register_buffer("after", module.part.weight.detach() + 1)

    assert_alike(body)


class Tied(nn.Module):
    """Has a weight of somebody else's, and what it makes of it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(weight.detach().sum(0))
        nn.init.constant_(weight[0], 5.0)


def outer(module):
    module.own = nn.Linear(300, 300)
    nn.init.ones_(module.own.weight)
    nn.init.zeros_(module.own.bias)
    return module.own.weight


def test_an_inner_module_shares_a_weight_of_the_outer():
    state = {"weight": torch.full((300, 300), 7.0), "bias": torch.zeros(300)}

    def body(module):
        weight = outer(module)
        module.tied = wl.load(lambda: Tied(weight), state)

    deferred = assert_alike(body)
    assert deferred.tied.weight is deferred.own.weight


def test_an_inner_constructor_reads_and_writes_a_weight_of_the_outer():
    def body(module, inner):
        weight = outer(module).data
        module.tied = inner(lambda: Tied(weight))

    ordinary = Holder(lambda module: body(module, lambda build: build()))
    deferred = wl.defer(lambda: Holder(lambda module: body(module, lambda build: wl.defer(build).materialize())))
    deferred = deferred.materialize()
    assert torch.equal(deferred.tied.bias, torch.full((300,), 300.0))
    assert torch.equal(deferred.own.weight, ordinary.own.weight)
    assert (deferred.own.weight[0] == 5).all()
