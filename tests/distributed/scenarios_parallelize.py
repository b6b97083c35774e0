"""What a ``parallelize`` function may do to tensors besides spreading them, on two ranks."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.distributed.models import Tied, assert_same_state, checkpoint_of, mesh
from tests.distributed.scenarios_two import RANK, _saved, fsdp_root
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import weightlift as wl


class Plain(nn.Module):
    """Two layers, and buffers that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.register_buffer("positions", torch.linspace(0, 1, 5), persistent=False)
        self.register_buffer("offset", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.b(self.a(x))


def a_frozen_alias_of_a_trained_weight_stays_frozen():
    class Alias(Plain):
        def __init__(self):
            super().__init__()
            self.b.weight = nn.Parameter(self.a.weight, requires_grad=False)

    state = checkpoint_of(Alias)
    reference = wl.load(Alias, state)
    for parallelize in (lambda model: model, fsdp_root, lambda m: fully_shard(m.a, mesh=mesh(2)) and None):
        model = wl.load(Alias, state, parallelize=parallelize)
        assert model.a.weight.requires_grad
        assert not model.b.weight.requires_grad
        assert_same_state(model, reference)
    model = wl.load(Alias, state, parallelize=lambda model: model)
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()


def a_tie_of_which_one_name_is_sharded_is_told_of():
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("weightlift").addHandler(handler)
    try:
        parallelize = lambda model: parallelize_module(model, mesh(2), {"head": ColwiseParallel()})  # noqa: E731
        model = wl.load(Tied, checkpoint_of(Tied, "head"), parallelize=parallelize)
    finally:
        logging.getLogger("weightlift").removeHandler(handler)
    assert isinstance(model.head.weight, DTensor) and not isinstance(model.embed.weight, DTensor)
    assert "parallelize unties head.weight from embed.weight: each gets memory of its own" in told
    assert_same_state(model, wl.load(Tied, checkpoint_of(Tied, "head")))


def values_after_to_empty_are_those_of_a_single_process():
    def parallelize(model):
        fully_shard(model.a, mesh=mesh(2))
        model.to_empty(device="cpu")
        nn.init.normal_(model.b.weight)  # what a rank samples for itself
        model.offset.fill_(RANK + 1)

    path = _saved("to_empty.pt", checkpoint_of(Plain, "a.bias", "b.weight"))
    reference = wl.load(Plain, path, strict=False, seed=3)
    for source_rank in (None, 0):
        model = wl.load(Plain, path, strict=False, seed=3, parallelize=parallelize, source_rank=source_rank)
        assert torch.equal(model.offset, torch.full((3,), RANK + 1.0))
        model.offset.zero_()
        assert_same_state(model, reference)


def hooks_and_attributes_that_parallelize_sets_are_kept():
    calls, handles = [], []

    def parallelize(model):
        fully_shard(model.a, mesh=mesh(2))
        for name, parameter in model.named_parameters():
            parameter.tag = name
            parameter.register_hook(lambda grad, name=name: calls.append(f"grad of {name}"))
            hook = lambda _, name=name: calls.append(f"accumulated {name}")  # noqa: E731
            handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def ran(model):
        calls.clear()
        model(torch.ones(2, 4)).sum().backward()
        return sorted(calls)

    ordinary = Plain()
    parallelize(ordinary)
    expected = ran(ordinary)
    handles.clear()
    for swap in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model = wl.load(Plain, checkpoint_of(Plain), parallelize=parallelize)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert [parameter.tag for parameter in model.parameters()] == [name for name, _ in model.named_parameters()]
        assert ran(model) == expected
        while handles:
            handles.pop().remove()
        assert ran(model) == [name for name in expected if name.startswith("grad")]


def views_of_a_tensor_that_is_sharded_are_refused_where_values_would_be_lost():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Linear(4, 4)
            self.register_buffer("row", self.x.weight.detach()[1])
            both = torch.randn(6, 4)
            self.one, self.two = nn.Parameter(both[:2]), nn.Parameter(both[2:])

    state = checkpoint_of(Views)
    for left_out in ((), ("x.weight",), ("row",)):
        rest = {name: value for name, value in state.items() if name not in left_out}
        with pytest.raises(wl.PlanError, match=r"row: it is a view of x\.weight"):
            wl.load(Views, rest, strict=False, parallelize=fsdp_root)

    def parallelize(model):
        for name in ("one", "two"):
            setattr(model, name, nn.Parameter(distribute_tensor(getattr(model, name), mesh(2), [Shard(0)])))

    assert_same_state(wl.load(Views, state, parallelize=parallelize), wl.load(Views, state))


def what_ordinary_constructors_sample_has_to_be_the_same():
    state = checkpoint_of(Plain, "b.weight")
    for parallelize in (fsdp_root, lambda m: fully_shard(m.a, mesh=mesh(2)) and None):
        options = {"strict": False, "defer": False, "seed": 1, "parallelize": parallelize}
        torch.manual_seed(RANK)
        with pytest.raises(wl.RanksError, match=r"b\.weight: missing in the checkpoint.*on rank 1 than on rank 0"):
            wl.load(Plain, state, **options)
        torch.manual_seed(7)
        model = wl.load(Plain, state, **options)
        torch.manual_seed(7)
        assert_same_state(model, wl.load(Plain, state, strict=False, defer=False))
        torch.manual_seed(RANK)
        assert_same_state(wl.load(Plain, checkpoint_of(Plain), **options), wl.load(Plain, checkpoint_of(Plain)))


SCENARIOS = {
    run.__name__: run
    for run in (
        a_frozen_alias_of_a_trained_weight_stays_frozen,
        a_tie_of_which_one_name_is_sharded_is_told_of,
        values_after_to_empty_are_those_of_a_single_process,
        hooks_and_attributes_that_parallelize_sets_are_kept,
        views_of_a_tensor_that_is_sharded_are_refused_where_values_would_be_lost,
        what_ordinary_constructors_sample_has_to_be_the_same,
    )
}
