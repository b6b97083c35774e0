"""Loads into modules that existed before, on two ranks: spread, unspread, left to another engine, and what fails."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tests.distributed.models import Tied, assert_same_state, checkpoint_of, fsdp, losses, mesh
from tests.distributed.scenarios_two import RANK, _own, _saved
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import weightlift as wl


def modules_whose_root_is_unsharded_after_a_forward():
    path = _saved("forward.pt", checkpoint_of(Tied))
    reference = wl.load(Tied, path)
    tokens = torch.arange(12).view(2, 6)
    for source_rank in (None, 0):
        for before in (False, True):
            model = fsdp(mesh(2))(Tied())
            plan = wl.plan(model, path, source_rank=source_rank) if before else None
            sharded = model.embed.weight
            with torch.no_grad():
                model(tokens)
            assert model.embed.weight is not sharded
            wl.load(model, path, source_rank=source_rank) if plan is None else plan.execute()
            assert model.embed.weight is sharded
            with torch.no_grad():
                assert torch.allclose(model(tokens), reference(tokens), rtol=1e-5)
            assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(deepcopy(reference)), rel=1e-5)


def another_engine_fills_modules_that_exist():
    class Normed(Tied):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

    state = checkpoint_of(Normed)
    state["norm.running_mean"] += 5
    path = _saved("existing_unfilled.pt", state)
    mine = path if RANK == 0 else "/nowhere"
    for dtype in (None, torch.bfloat16):
        model = Normed()
        kept, values = model.embed.weight, model.embed.weight.detach().clone()
        memory = kept.data_ptr()
        assert wl.load(model, mine, source_rank=0, dtype=dtype) is model
        assert model.embed.weight is model.head.weight is kept
        assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
        assert model.positions.dtype == (dtype or torch.float32)
        if RANK == 1:
            assert torch.equal(kept, values.to(dtype or torch.float32))
            assert (kept.data_ptr() == memory) == (dtype is None)
        assert_same_state(DistributedDataParallel(model).module, wl.load(Normed, path, dtype=dtype))
    model = wl.load(Normed, mine, source_rank=0)
    assert bool(model.norm.running_mean.any()) == (RANK == 0)  # it comes with the parameters
    assert_same_state(DistributedDataParallel(model).module, wl.load(Normed, path))
    ordinary = wl.load(Normed, mine, source_rank=0, dtype=torch.bfloat16, defer=False)
    assert_same_state(DistributedDataParallel(ordinary).module, wl.load(Normed, path, dtype=torch.bfloat16))


def the_trace_of_a_rank_that_is_left_unfilled_has_its_work():
    class Positioned(Tied):
        def __init__(self):
            super().__init__()
            self.register_buffer("angles", torch.randn(300, 300), persistent=False)

    path = _saved("traced.pt", checkpoint_of(Tied))
    trace = Path(os.environ["SCENARIO_FOLDER"], f"trace{RANK}.json")
    wl.load(Positioned, path if RANK == 0 else "/nowhere", source_rank=0, trace=trace)
    events = {event["cat"] for event in json.loads(trace.read_text())["traceEvents"] if "cat" in event}
    assert {"init", "assign"} <= events, events


def a_module_that_exists_is_parallelised_and_filled():
    path = _saved("exists.pt", checkpoint_of(Tied))
    reference = wl.load(Tied, path)
    for source_rank in (None, 1):
        model = Tied()
        before = dict(model.named_parameters())
        plan = wl.plan(model, path, parallelize=fsdp(mesh(2)), source_rank=source_rank)
        assert all(before[name] is parameter for name, parameter in model.named_parameters())
        assert plan.execute() is model
        assert isinstance(model.embed.weight, DTensor)
        assert_same_state(model, reference)
        with torch.no_grad():
            model.layers[0].up.weight.zero_()
        kept = model.embed.weight
        assert_same_state(plan.execute(), reference)
        assert model.embed.weight is kept
    assert losses(model) == pytest.approx(losses(reference), rel=1e-5)
    model = Tied()
    weight = model.embed.weight
    wl.load(model, path, parallelize=lambda model: model)
    assert model.embed.weight is weight
    assert_same_state(model, wl.load(Tied, path))


def _same_tensors(model, before):
    found = [*model.named_parameters(), *model.named_buffers()]
    return len(found) == len(before) and all(
        tensor is old and torch.equal(tensor, value) for (_, tensor), (old, value) in zip(found, before)
    )


def a_module_that_exists_keeps_its_tensors_where_a_load_fails():
    state = checkpoint_of(Tied)
    model = Tied()
    before = [(tensor, tensor.clone()) for tensor in (*model.parameters(), *model.buffers())]

    def everywhere(model):
        fully_shard(model.layers[0], mesh=mesh(2))
        raise KeyError("on every rank")

    def on_one(model):
        if RANK == 1:
            raise KeyError("only here")

    def spoilt(model):
        model.embed.weight = nn.Parameter(model.embed.weight[:3])

    for parallelize, expected in ((everywhere, KeyError), (on_one, (KeyError, wl.RanksError)), (spoilt, wl.PlanError)):
        with pytest.raises(expected):
            wl.load(model, state, parallelize=parallelize)
        assert _same_tensors(model, before), parallelize
        model = Tied()
        before = [(tensor, tensor.clone()) for tensor in (*model.parameters(), *model.buffers())]
    other = state | {"head.weight": state["head.weight"] + 1}
    with pytest.raises(wl.PlanError, match="two different values"):
        wl.load(model, other, parallelize=fsdp(mesh(2)))
    assert _same_tensors(model, before)

    own = _own("fails.pt")
    torch.save(state, own)
    os.utime(own, (1, 1))
    plan = wl.plan(model, own, parallelize=fsdp(mesh(2)), copy=True)
    if RANK == 1:
        own.rename(own.with_suffix(".away"))
    with pytest.raises((wl.WeightliftError, OSError)):
        plan.execute()
    assert _same_tensors(model, before)
    if RANK == 1:
        own.with_suffix(".away").rename(own)
    assert_same_state(plan.execute(), wl.load(Tied, state))
    assert isinstance(model.embed.weight, DTensor)


def a_deferred_module_that_could_not_be_parallelised_can_be_materialised():
    state = checkpoint_of(Tied)
    deferred = wl.defer(Tied, seed=0)

    def parallelize(model):
        raise KeyError("not today")

    with pytest.raises(KeyError):
        deferred.load(state, parallelize=parallelize)
    assert_same_state(deferred.materialize(), wl.defer(Tied, seed=0).materialize())


def a_module_that_has_changed_on_one_rank_stops_all_at_once():
    model = fsdp(mesh(2))(Tied())
    plan = wl.plan(model, checkpoint_of(Tied), source_rank=0, rank_patience_seconds=5)
    if RANK == 1:
        model.register_buffer("more", torch.zeros(1))
    began = time.monotonic()
    expected, text = ((wl.RanksError, "rank 1: PlanError"), (wl.PlanError, "more: is new"))[RANK]
    with pytest.raises(expected, match=text):
        plan.execute()
    assert time.monotonic() - began < 20


def a_dtensor_keeps_its_dtype():
    path = _saved("dtype.pt", checkpoint_of(Tied))
    model = fsdp(mesh(2))(Tied())
    with pytest.raises(wl.PlanError, match=r"embed\.weight: it is a DTensor of .*cast the module before"):
        wl.plan(model, path, dtype=torch.bfloat16)
    reference = wl.load(Tied, path, dtype=torch.bfloat16)
    assert_same_state(wl.load(fsdp(mesh(2))(Tied().bfloat16()), path, dtype=torch.bfloat16), reference)


def dtensors_stay_as_they_are_where_a_hash_differs():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt")
        torch.save(checkpoint_of(Tied), path)
        for digest, fits in ((hashlib.sha256(path.read_bytes()).hexdigest(), True), ("0" * 64, False)):
            Path(folder, "SHA256SUMS").write_text(f"{digest}  model.pt\n")
            model = fsdp(mesh(2))(Tied())
            before = {name: tensor._local_tensor.clone() for name, tensor in model.named_parameters()}
            with contextlib.nullcontext() if fits else pytest.raises(wl.CheckpointCorrupt):
                wl.load(model, path, verify=True)
            same = [torch.equal(before[name], tensor._local_tensor) for name, tensor in model.named_parameters()]
            assert all(same) != fits


def what_fsdp1_has_wrapped_is_refused_and_stays_as_it_is():
    path = _saved("flat.pt", checkpoint_of(Tied))
    cpu = torch.device("cpu")
    for original in (True, False):
        block, model = Tied(), Tied()
        block.layers[0] = FullyShardedDataParallel(block.layers[0], use_orig_params=original, device_id=cpu)
        model = FullyShardedDataParallel(model, use_orig_params=original, device_id=cpu)
        for wrapped in (block, model):
            with pytest.raises(wl.PlanError, match=r"flat parameters .* load before it is wrapped"):
                wl.load(wrapped, path)
        model.load_state_dict(torch.load(path))  # as the error says
        loaded = FullyShardedDataParallel(wl.load(Tied, path), use_orig_params=original, device_id=cpu)
        assert losses(model, steps=2) == losses(loaded, steps=2)


SCENARIOS = {
    run.__name__: run
    for run in (
        modules_whose_root_is_unsharded_after_a_forward,
        another_engine_fills_modules_that_exist,
        the_trace_of_a_rank_that_is_left_unfilled_has_its_work,
        a_module_that_exists_is_parallelised_and_filled,
        a_module_that_exists_keeps_its_tensors_where_a_load_fails,
        a_deferred_module_that_could_not_be_parallelised_can_be_materialised,
        a_module_that_has_changed_on_one_rank_stops_all_at_once,
        a_dtensor_keeps_its_dtype,
        dtensors_stay_as_they_are_where_a_hash_differs,
        what_fsdp1_has_wrapped_is_refused_and_stays_as_it_is,
    )
}
