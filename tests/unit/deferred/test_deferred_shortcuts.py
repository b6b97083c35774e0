"""What is recorded at the level of functions: whole initialisers, births, and how few objects that takes."""

import gc
from collections import Counter

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.deferred.functions import FunctionRecorder
from weightlift.deferred.inventory import has_other_users, storage_address
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.tape import Fill, generator_for

WHOLE = [
    (nn.init.kaiming_uniform_, {}),
    (nn.init.kaiming_uniform_, {"a": 5**0.5}),
    (nn.init.kaiming_uniform_, {"a": 1, "mode": "fan_out"}),
    *((nn.init.kaiming_uniform_, {"nonlinearity": name}) for name in ("relu", "linear", "tanh", "selu", "sigmoid")),
    (nn.init.uniform_, {"a": -0.5, "b": 2}),
    (nn.init.normal_, {"mean": 1, "std": 0.02}),
    (nn.init.constant_, {"val": 0.3}),
]


@pytest.fixture
def recorder():
    made = Recorder(seed=3)
    with FunctionRecorder(made), made:
        yield made


@pytest.mark.parametrize(("function", "arguments"), WHOLE)
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_initialiser_gives_what_it_gives_at_once(recorder, function, arguments, shape, dtype):
    tensor = nn.Parameter(torch.empty(shape, dtype=dtype))
    assert function(tensor, **arguments) is tensor
    node = recorder.record_of(tensor).last
    assert isinstance(node, Fill)
    assert not node.done
    node.seed_label = "a label"
    recorder.force_tensors([tensor], "the test")
    random = {"generator": generator_for(3, "a label")} if function is not nn.init.constant_ else {}
    expected = function(torch.zeros(shape, dtype=dtype), **arguments, **random)
    assert torch.equal(tensor.detach(), expected)


def test_kaiming_uniform_counts_its_fan_when_it_is_replayed(recorder):
    layer = nn.Linear(5, 7)
    assert recorder.record_of(layer.weight).last.func is nn.init.kaiming_uniform_


def test_of_an_initialiser_of_a_part_the_rest_stays_as_it_was(recorder):
    tensor = torch.ones(6, 4)
    nn.init.kaiming_uniform_(tensor[2:4])
    nn.init.constant_(tensor[5:], 7)
    recorder.force_tensors([tensor], "the test")
    rows = tensor.detach()
    assert torch.equal(rows[:2], torch.full((2, 4), 1.0))
    assert torch.equal(rows[5], torch.full((4,), 7.0))
    assert (rows[2:4].abs() < 1.3).all()
    assert (rows[2:4] != 1).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "arguments"),
    [
        ((4, 6), torch.float32, {"mode": "sideways"}),
        ((4, 6), torch.float32, {"nonlinearity": "no such"}),
        ((4, 6), torch.float32, {"a": True}),
        ((4, 6), torch.float32, {"a": "0"}),
        ((4, 6), torch.float32, {"a": float("nan")}),
        ((4,), torch.float32, {}),
        ((4, 6), torch.int64, {}),
    ],
)
def test_what_torch_refuses_is_refused_at_the_call(recorder, shape, dtype, arguments):
    tensor = torch.empty(shape, dtype=dtype)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        nn.init.kaiming_uniform_(tensor, **arguments)
        recorder.force_tensors([tensor], "the test")


def test_a_generator_of_the_callers_is_drawn_from_at_the_call(recorder):
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    tensor = nn.init.kaiming_uniform_(torch.empty(3, 3), generator=generator)
    assert not recorder.record_of(tensor).pending
    assert not torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(("make", "value"), [(torch.ones, 1), (torch.zeros, 0)])
def test_ones_and_zeros_are_born_like_empty(recorder, make, value):
    for made in (make(3), make(2, 3), make((2, 3), dtype=torch.int8), make([2, 3]), make(())):
        assert recorder.record_of(made) is not None
        assert recorder.record_of(made).pending == bool(value)
        assert not made._is_view()
        recorder.force_tensors([made], "the test")
        assert made.eq(value).all().item()
    assert make(3).dtype == torch.get_default_dtype()
    assert make(3, requires_grad=True).requires_grad
    assert make(2, device="meta").is_meta
    assert make(0).shape == (0,)


def objects():
    gc.collect()
    return Counter(type(item) for item in gc.get_objects())


class Layers(nn.Module):
    def __init__(self, count=200):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 5) for _ in range(count))
        self.norms = nn.ModuleList(nn.LayerNorm(3) for _ in range(count))


def cost_of_deferring():
    """The objects that a deferred module is more than one on ``meta``."""
    before = objects()
    with torch.device("meta"):
        plain = Layers()
    ordinary = objects()
    made = wl.defer(Layers)
    deferred = objects()
    assert plain is not None and made is not None
    return deferred.total() - ordinary.total() - (ordinary.total() - before.total())


def test_a_deferred_parameter_costs_the_collector_three_objects():
    made = wl.defer(Layers)
    count, slots = len(list(Layers().parameters())), len(made._subject.inventory.slots)
    # Others make objects meanwhile, too: what runs besides in this process, caches that are filled for the first time.
    assert min(cost_of_deferring() for _ in range(3)) <= 3 * count + slots + 100


def test_a_plan_makes_no_storage_objects():
    state = {name: torch.zeros_like(value) for name, value in Layers().state_dict().items()}
    made = wl.defer(Layers)
    checkpoint = wl.open_checkpoint(state)
    before = objects()[torch.UntypedStorage]
    made.plan(checkpoint)
    assert objects()[torch.UntypedStorage] == before


def test_a_storage_object_is_no_other_user_and_a_view_is():
    tensor = torch.zeros(4)
    address = storage_address(tensor)
    assert not has_other_users(tensor, address, 1)
    tensor.untyped_storage()
    assert not has_other_users(tensor, address, 1)
    view = tensor[1:]
    assert has_other_users(tensor, address, 1)
    assert not has_other_users(tensor, address, 2)
    del view
    assert not has_other_users(tensor, address, 1)
