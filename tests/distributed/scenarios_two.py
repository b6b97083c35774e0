"""What two ranks do together."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tests.distributed.models import (
    Experts,
    Tied,
    assert_same_state,
    checkpoint_of,
    expert_parallel,
    fsdp,
    gathered,
    losses,
    mesh,
    tensor_parallel,
)
from tests.distributed.parts import load_merged, merged, separate
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import weightlift as wl
from weightlift.distributed.environment import efficient_loading_source

RANK = int(os.environ.get("RANK", "0"))
FOLDER = Path(os.environ.get("SCENARIO_FOLDER", "."))
MISSING = ("head", "layers.1.up", "layers.0.norm")


def _saved(name, state):
    """A file that the first rank writes and all can read."""
    path = FOLDER / name
    if RANK == 0:
        torch.save(state, path)
    dist.barrier()
    return path


def _own(name):
    """A file for each rank, as on machines that share no disk."""
    (FOLDER / f"own{RANK}").mkdir(exist_ok=True)
    return FOLDER / f"own{RANK}" / name


def _llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, **options,
    )  # fmt: skip
    return lambda: LlamaForCausalLM(config)


def fsdp2_of_a_tied_model():
    path = _saved("tied.pt", checkpoint_of(Tied, *MISSING))
    reference = wl.load(Tied, path, strict=False, seed=3)
    for copy in (False, True):
        model = wl.load(Tied, path, strict=False, seed=3, copy=copy, parallelize=fsdp(mesh(2)))
        assert model.head.weight is model.embed.weight
        assert isinstance(model.embed.weight, DTensor)
        assert model.embed.weight.to_local().shape[0] == (51, 50)[RANK]
        assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-5)


def the_plan_names_what_the_load_will_do():
    plan = wl.plan(Tied, _saved("plan.pt", checkpoint_of(Tied)), parallelize=fsdp(mesh(2)))
    assert not plan.problems
    assert "tied" in str(plan)
    assert_same_state(plan.execute(), wl.load(Tied, FOLDER / "plan.pt"))


class Odd(Tied):
    """With buffers that are no strided tensors, which stay as every rank's constructor makes them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("graph", torch.eye(30).to_sparse(), persistent=False)
        self.register_buffer("rows", torch.eye(4).to_sparse_csr(), persistent=False)
        self.register_buffer("ragged", torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]), persistent=False)
        self.mean = nn.Parameter(torch.zeros(30))

    def odd(self):
        return self.graph.to_dense().tolist(), self.rows.to_dense().tolist(), [part.tolist() for part in self.ragged]


def tensors_that_are_not_strided_stay_as_they_were_made():
    path = _saved("odd.pt", checkpoint_of(Odd))
    reference = wl.load(Odd, path)
    assert reference.odd() == Odd().odd()
    for options in ({}, {"source_rank": 0}):
        model = wl.load(Odd, path if RANK == 0 or not options else "/nowhere", parallelize=fsdp(mesh(2)), **options)
        state = gathered(model)
        assert model.odd() == reference.odd(), options
        assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items()), options
    # Its parameters are for another engine to fill; nobody sends these.
    assert wl.load(Odd, path if RANK == 0 else "/nowhere", source_rank=0).odd() == reference.odd()
    plan = wl.plan(Odd, path, mesh_shape={"fsdp": 2})
    assert not plan.problems and "sparse" in str(plan) and "nested" in str(plan)


class OddParameter(Odd):
    """With a parameter that is no strided tensor, which no checkpoint has."""

    def __init__(self):
        super().__init__()
        self.links = nn.Parameter(torch.eye(5).to_sparse())


def parameters_that_are_not_strided_are_nobodys_to_send():
    def first_layer(model):
        fully_shard(model.layers[0], mesh=mesh(2))

    path = _saved("odd_parameter.pt", checkpoint_of(OddParameter, "links"))
    for options in ({}, {"dtype": torch.float64}, {"parallelize": first_layer, "defer": False}):
        model = wl.load(OddParameter, path if RANK == 0 else "/nowhere", source_rank=0, strict=False, **options)
        assert torch.equal(model.links.to_dense(), torch.eye(5, dtype=model.links.dtype)), options
        assert model.odd() == Odd().odd(), options
    with_it = wl.plan(OddParameter, path, strict=False, mesh_shape={"fsdp": 2}).ranks
    without = wl.plan(Odd, path, mesh_shape={"fsdp": 2}).ranks
    assert with_it.result_bytes == without.result_bytes > 0


def tensor_parallel_llama():
    build = _llama()
    path = _saved("llama.pt", checkpoint_of(build, "lm_head", "model.layers.1.self_attn.o_proj"))
    reference = wl.load(build, path, strict=False, seed=3)
    model = wl.load(build, path, strict=False, seed=3, parallelize=tensor_parallel(mesh(2)))
    assert model.model.layers[0].self_attn.o_proj.weight.placements == (Shard(1),)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def ties_that_tensor_parallelism_gives_up_are_tied_again():
    def parallelize(model):
        plan = {"embed": RowwiseParallel(), "head": ColwiseParallel()}
        parallelize_module(model, mesh(2), plan)

    state = checkpoint_of(Tied, "head")
    model = wl.load(Tied, state, parallelize=parallelize)
    assert isinstance(model.head.weight, DTensor)
    assert model.head.weight is model.embed.weight
    assert_same_state(model, wl.load(Tied, state))


def fsdp2_llama():
    build = _llama()
    path = _saved("llama2.pt", checkpoint_of(build, "lm_head", "model.layers.1.self_attn.o_proj"))
    reference = wl.load(build, path, strict=False, seed=3)
    model = wl.load(build, path, strict=False, seed=3, parallelize=fsdp(mesh(2)))
    assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def fsdp2_and_experts():
    path = _saved("experts.pt", checkpoint_of(Experts, "down"))
    reference = wl.load(Experts, path, strict=False, seed=5)
    model = wl.load(Experts, path, strict=False, seed=5, parallelize=expert_parallel(mesh(2)))
    assert model.up.to_local().shape[0] == 3
    assert_same_state(model, reference)
    expected = losses(deepcopy(reference))
    for parallelize in (fsdp(mesh(2)), tensor_parallel(mesh(2))):
        model = wl.load(Experts, path, strict=False, seed=5, parallelize=parallelize)
        assert_same_state(model, reference)
        assert losses(model) == pytest.approx(expected, rel=1e-5)


def every_byte_is_read_once_over_all_ranks():
    def build():
        return Tied(width=256, layers=4, vocabulary=1000)

    path = FOLDER / "bytes.safetensors"
    if RANK == 0:
        save_file(checkpoint_of(build, "head"), path)
    dist.barrier()
    plan = wl.plan(build, path, copy=True, parallelize=fsdp(mesh(2)))
    before = _rchar()
    plan.execute()
    read = torch.tensor([_rchar() - before])
    dist.all_reduce(read)
    size = path.stat().st_size
    assert 0.99 * size < read.item() < 1.02 * size, (read.item(), size)
    paper = wl.plan(build, path, mesh_shape={"fsdp": 2}).ranks
    assert abs(paper.read_bytes - read.item()) < 0.02 * size


def what_ranks_saved_together_is_read_as_it_is_needed():
    """By torch.distributed.checkpoint, in the boxes of one mesh; loaded whole, and in those of another."""
    ways = {"fsdp": fsdp(mesh(2)), "tensors": tensor_parallel(mesh(2)), "whole": None}
    path = _saved("before.pt", checkpoint_of(Tied))
    reference = wl.load(Tied, path)
    for saved, parallelize in ways.items():
        model = wl.load(Tied, path, parallelize=parallelize)
        folder = FOLDER / f"dcp-{saved}"
        dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=folder)
        checkpoint = wl.open_checkpoint(folder, within="model")
        assert any(entry.chunks for entry in checkpoint.values()) == (saved != "whole")
        for again in ways.values():
            for options in ({}, {"source_rank": 0}) if again is not None else ({},):
                assert_same_state(wl.load(Tied, checkpoint, parallelize=again, **options), reference)
    wl.load(model := Tied(), checkpoint)
    assert_same_state(model, reference)


def what_ranks_saved_as_safetensors_is_read_as_it_is_needed():
    path = _saved("before.pt", checkpoint_of(Tied))
    reference = wl.load(Tied, path)
    for saved, parallelize in (("fsdp", fsdp(mesh(2))), ("tensors", tensor_parallel(mesh(2)))):
        model = wl.load(Tied, path, parallelize=parallelize)
        folder = FOLDER / f"hf-{saved}"
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        state = {name: value for name, value in model.state_dict().items() if name != "head.weight"}  # it is tied
        dcp.save(state, storage_writer=writer)
        dist.barrier()
        assert any(entry.chunks for entry in wl.open_checkpoint(folder).values())
        for again in (None, fsdp(mesh(2)), tensor_parallel(mesh(2))):
            assert_same_state(wl.load(Tied, folder, parallelize=again), reference)


def every_byte_of_what_ranks_saved_together_is_read_once():
    def build():
        return Tied(width=256, layers=4, vocabulary=1000)

    path = _saved("whole.pt", checkpoint_of(build))
    model = wl.load(build, path, parallelize=tensor_parallel(mesh(2)))
    dcp.save(model.state_dict(), checkpoint_id=FOLDER / "dcp-bytes")
    plan = wl.plan(build, FOLDER / "dcp-bytes", copy=True, parallelize=fsdp(mesh(2)))
    before = _rchar()
    loaded = plan.execute()
    read = torch.tensor([_rchar() - before])
    dist.all_reduce(read)
    size = sum(entry.nbytes for entry in wl.open_checkpoint(path).values()) - model.head.weight.nbytes
    tied = 2 * model.head.weight.nbytes  # saved under both names, and compared
    assert 0.99 * size < read.item() < 1.05 * size + 2 * tied, (read.item(), size, tied)
    assert_same_state(loaded, wl.load(build, path))


def _rchar():
    return int(Path("/proc/self/io").read_text().split()[1])


def no_rank_holds_the_model_on_the_way():
    """Missing weights are made whole, one after the other; the memory goes back before the next."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(12))  # 16.8 MB each

    plan = wl.plan(Wide, {}, strict=False, seed=3, parallelize=fsdp(mesh(2)), memory_budget_bytes=20 << 20)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    model = plan.execute()
    grown, whole = _status("VmHWM") - before, 12 * 2048 * 2048 * 4
    assert grown < whole / 2 + (60 << 20), (grown, whole)
    assert_same_state(model, wl.load(Wide, {}, strict=False, seed=3))


def _anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous"))


def _status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def a_quantised_model_comes_through_unchanged():
    """Packed integers and their scales, as compressed tensors hold them: parameters without gradients, and buffers."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_packed = nn.Parameter(torch.zeros(63, 8, dtype=torch.int32), requires_grad=False)
            self.weight_scale = nn.Parameter(torch.ones(63, 1), requires_grad=False)
            self.fp8 = nn.Parameter(torch.zeros(33, 7, dtype=torch.float8_e4m3fn), requires_grad=False)
            self.register_buffer("zero_point", torch.zeros(63, dtype=torch.int8))

    state = {
        "weight_packed": torch.randint(-9, 9, (63, 8), dtype=torch.int32),
        "weight_scale": torch.arange(63.0).view(63, 1),
        "fp8": torch.arange(231.0).view(33, 7).to(torch.float8_e4m3fn),
        "zero_point": torch.arange(63, dtype=torch.int8),
    }
    path = _saved("packed.pt", state)
    state = torch.load(path)
    for source_rank in (None, 0):
        model = wl.load(Packed, path, parallelize=fsdp_root, source_rank=source_rank)
        assert model.weight_packed.to_local().shape[0] == (32, 31)[RANK]
        rows = slice(0, 17) if RANK == 0 else slice(17, 33)
        assert torch.equal(model.fp8.to_local().view(torch.uint8), state["fp8"][rows].view(torch.uint8))
        rows = slice(0, 32) if RANK == 0 else slice(32, 63)
        assert torch.equal(model.weight_packed.to_local(), state["weight_packed"][rows])
        assert torch.equal(model.zero_point, state["zero_point"])
    model = wl.load(Packed, path, source_rank=0)
    model.fp8 = None  # DistributedDataParallel can't send it with gloo
    DistributedDataParallel(nn.ModuleList([model, nn.Linear(1, 1)]))
    assert torch.equal(model.weight_packed, state["weight_packed"])


def shards_of_another_dim():
    path = _saved("dim.pt", checkpoint_of(Tied, *MISSING))
    parallelize = fsdp(mesh(2), shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else Shard(0))
    model = wl.load(Tied, path, strict=False, seed=3, parallelize=parallelize)
    assert model.embed.weight.placements == (Shard(1),)
    assert_same_state(model, wl.load(Tied, path, strict=False, seed=3))


def tensors_merged_of_several_are_sharded():
    state = separate()
    path = FOLDER / "separate.safetensors"
    if RANK == 0:
        save_file(state, path)
    dist.barrier()
    expected = merged(state)
    for dim in (0, 1):
        for source_rank in (None, 1):
            for dtype in (None, torch.bfloat16):
                parallelize = lambda m: fully_shard(m, mesh=mesh(2), shard_placement_fn=lambda p: Shard(dim))  # noqa: E731, B023
                model = load_merged(
                    wl.open_checkpoint(path), parallelize=parallelize, source_rank=source_rank, dtype=dtype
                )
                assert model.up.to_local().shape[dim] == ((2, 1), (6, 6))[dim][RANK]
                for name, value in gathered(model).items():
                    assert torch.equal(value, expected[name].to(dtype or torch.float32)), name


def more_ranks_than_rows():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.randn(1, 5))
            self.gone = nn.Parameter(torch.randn(1))
            self.scalar = nn.Parameter(torch.randn(()))

    path = _saved("small.pt", checkpoint_of(Small, "gone"))

    def parallelize(model):
        for name in ("one", "gone"):
            setattr(model, name, nn.Parameter(distribute_tensor(getattr(model, name), mesh(2), [Shard(0)])))

    model = wl.load(Small, path, strict=False, seed=1, parallelize=parallelize)
    assert model.one.to_local().shape == ((1, 5), (0, 5))[RANK]
    assert_same_state(model, wl.load(Small, path, strict=False, seed=1))


def dtypes_are_what_parallelize_sees():
    path = _saved("dtype.pt", checkpoint_of(Tied, *MISSING))
    seen = []

    def parallelize(model):
        seen.append(model.embed.weight.dtype)
        model.layers[0].requires_grad_(False)
        fsdp(mesh(2))(model)

    model = wl.load(Tied, path, strict=False, seed=3, dtype=torch.bfloat16, parallelize=parallelize)
    assert seen == [torch.bfloat16]
    assert not model.layers[0].up.weight.requires_grad
    assert_same_state(model, wl.load(Tied, path, strict=False, seed=3, dtype=torch.bfloat16))
    cast = wl.load(Tied, path, strict=False, seed=3, parallelize=lambda m: fsdp(mesh(2))(m.bfloat16()))
    assert cast.embed.weight.dtype == torch.bfloat16
    assert_same_state(cast, wl.load(Tied, path, strict=False, seed=3, dtype=torch.bfloat16))


def nothing_is_initialised_for_what_is_loaded():
    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(40, 40)
            self.b = nn.Linear(40, 40)

    deferred = wl.defer(Noted, seed=0)
    calls = [deferred._subject.record_of(slot.tensor).last for slot in deferred._subject.inventory.slots]
    deferred.load(checkpoint_of(Noted, "b.weight"), strict=False, parallelize=fsdp_root)
    ran = [call.done for call in calls]
    assert ran == [False, False, True, False], ran


def fsdp_root(model):
    return fully_shard(model, mesh=mesh(2))


def recurrent_modules_keep_their_lists():
    def parallelize(model):
        for name, parameter in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(distribute_tensor(parameter, mesh(2), [Replicate()])))

    build = lambda: nn.LSTM(6, 8)  # noqa: E731
    model = wl.load(build, checkpoint_of(build), parallelize=parallelize)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters()))


def modules_that_have_dtensors_already():
    state = checkpoint_of(Tied)
    reference = wl.load(Tied, state)
    torch.manual_seed(0)
    real = fsdp(mesh(2))(Tied())
    kept = real.embed.weight
    assert_same_state(wl.load(real, state), reference)
    assert real.embed.weight is kept

    def build():
        return fsdp(mesh(2))(Tied())

    assert_same_state(wl.load(build, state, defer=False), reference)


def what_parallelize_spoils_is_said():
    def shrink(model):
        model.head = nn.Linear(3, 3, device="meta")

    with pytest.raises(wl.PlanError, match=r"head\.weight: its module is not part .* may wrap modules, but"):
        wl.load(Tied, checkpoint_of(Tied), parallelize=shrink)

    def cut(model):
        model.layers[0].up.weight = nn.Parameter(model.layers[0].up.weight[:3])

    with pytest.raises(wl.PlanError, match=r"shape \[3, 30\] that names no part"):
        wl.load(Tied, checkpoint_of(Tied), parallelize=cut)


def tied_values_that_differ_are_refused():
    state = checkpoint_of(Tied)
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(wl.PlanError, match="two different values"):
        wl.load(Tied, _saved("differ.pt", state), parallelize=fsdp(mesh(2)))


def one_rank_reads_for_all():
    path = _saved("source.pt", checkpoint_of(Tied, *MISSING))
    reference = wl.load(Tied, path, strict=False, seed=3)
    mine = path if RANK == 0 else "/nowhere"
    for parallelize in (fsdp(mesh(2)), tensor_parallel(mesh(2)), lambda model: model):
        model = wl.load(
            Tied, mine, strict=False, seed=3, parallelize=parallelize, source_rank=0, memory_budget_bytes=1 << 19
        )
        assert_same_state(model, reference)
    model = wl.load(Tied, mine, strict=False, seed=3, dtype=torch.bfloat16, parallelize=fsdp(mesh(2)), source_rank=0)
    assert_same_state(model, wl.load(Tied, path, strict=False, seed=3, dtype=torch.bfloat16))


def the_source_can_be_any_rank_and_a_mapping():
    state = checkpoint_of(Tied)
    model = wl.load(Tied, state if RANK == 1 else None, parallelize=fsdp(mesh(2)), source_rank=1)
    assert_same_state(model, wl.load(Tied, state))


def another_engine_fills_the_other_ranks():
    path = _saved("unfilled.pt", checkpoint_of(Tied, *MISSING))
    reference = wl.load(Tied, path, strict=False, seed=3)
    mine = path if RANK == 0 else "/nowhere"
    model = wl.load(Tied, mine, strict=False, seed=3, source_rank=0)
    assert torch.equal(model.positions, reference.positions)
    assert bool(model.embed.weight.any()) == (RANK == 0)
    assert_same_state(DistributedDataParallel(model).module, reference)
    model = wl.load(Tied, mine, strict=False, seed=3, source_rank=0, dtype=torch.bfloat16)
    state = model.state_dict() if RANK == 0 else {}
    fsdp(mesh(2))(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    assert_same_state(model, wl.load(Tied, path, strict=False, seed=3, dtype=torch.bfloat16))


def a_tie_that_the_source_gives_up_is_given_up_by_all():
    state = checkpoint_of(Tied)
    state["head.weight"] = state["head.weight"] + 1
    path = _saved("given_up.pt", state)
    model = wl.load(Tied, path if RANK == 0 else "/nowhere", strict=False, source_rank=0)
    assert model.head.weight is not model.embed.weight
    assert_same_state(DistributedDataParallel(model).module, wl.load(Tied, state, strict=False))
    model = wl.load(Tied(), path if RANK == 0 else "/nowhere", strict=False, source_rank=0)
    assert model.head.weight is not model.embed.weight
    assert_same_state(DistributedDataParallel(model).module, wl.load(Tied, state, strict=False))


def what_another_engine_fills_takes_no_memory_before():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(6))  # 101 MB
            self.register_buffer("table", torch.linspace(0, 1, 4096), persistent=False)

    state = Wide().state_dict() if RANK == 0 else None
    whole = 6 * 2048 * 2049 * 4
    for dtype, share in ((None, 1), (torch.bfloat16, 2), (torch.float64, 0.5)):
        wl.empty_cache()  # what is looked at is new memory
        before = _anonymous()
        model = wl.load(Wide, state, dtype=dtype, source_rank=0, copy=True)
        grown = _anonymous() - before
        assert (grown > 0.9 * whole / share) if RANK == 0 else (grown < 0.05 * whole / share), (grown, dtype)
        assert torch.equal(model.table, torch.linspace(0, 1, 4096, dtype=model.table.dtype)) or dtype is not None
        del model


def accelerate_fills_the_other_ranks():
    """The steps of accelerate's FSDP2 preparation around its own broadcast; the whole refuses to run on the CPU."""
    from accelerate import Accelerator
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict

    build = _llama()
    state = checkpoint_of(build, "lm_head")
    reference = wl.load(build, state, copy=True)
    model = wl.load(build, state if RANK == 0 else None, copy=True, source_rank=0)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    accelerator = Accelerator(cpu=True)
    whole = model.state_dict()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = model.to("meta")
    model.tie_weights()
    fsdp(mesh(2))(model)
    fsdp2_load_full_state_dict(accelerator, model, whole)
    model.tie_weights()
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)
    assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-5)


def accelerates_variables_name_the_source():
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    for values, expected in ((("true", "true"), 0), (("1", "1"), 0), (("true", "false"), None), (("", ""), None)):
        os.environ.update(zip(names, values))
        assert efficient_loading_source() == expected
    for name in names:
        del os.environ[name]


class Wide(Tied):
    def __init__(self, more):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(len(self.scale) + more))


def ranks_that_differ_are_named():
    state = checkpoint_of(Tied)
    path = _saved("agree.pt", state)
    with pytest.raises(wl.RanksError, match="rank 1 has another set of options than rank 0"):
        wl.load(Tied, path, strict=RANK == 0, parallelize=fsdp(mesh(2)))
    with pytest.raises(wl.RanksError, match=r"rank 1 has another module than rank 0 — .* process_group .* pipeline"):
        wl.load(lambda: Tied(layers=3 - RANK), path, strict=False, parallelize=fsdp(mesh(2)))
    # What follows from that is not said of the checkpoint, which is the same.
    for build, options in (
        (lambda: Tied(layers=3 - RANK), {}),
        (lambda: Wide(RANK), {"ignore_mismatched": True}),
        (Tied, {"dtype": (None, torch.bfloat16)[RANK]}),
    ):
        with pytest.raises(wl.RanksError) as caught:
            wl.load(build, path, strict=False, parallelize=fsdp(mesh(2)), **options)
        assert len(caught.value.problems) == 1, caught.value
    other = _own("agree.pt")
    torch.save({key: value + RANK for key, value in state.items()}, other)
    with pytest.raises(wl.RanksError, match="rank 1 has another checkpoint than rank 0"):
        wl.load(Tied, other, parallelize=fsdp(mesh(2)))
    torch.save(state, other)
    assert_same_state(wl.load(Tied, other, parallelize=fsdp(mesh(2))), wl.load(Tied, path))


def ranks_that_would_wait_for_one_another_are_named():
    state = checkpoint_of(Tied)
    for options in ({"source_rank": RANK}, {"source_rank": (None, 1)[RANK]}, {"seed": (None, 3)[RANK]}):
        with pytest.raises(wl.RanksError, match="rank 1 has another set of options than rank 0"):
            wl.load(Tied, state, parallelize=fsdp(mesh(2)), **options)


def mappings_that_differ_are_named():
    state = checkpoint_of(Tied)
    for name in ("embed.weight", "layers.2.norm.bias"):
        other = dict(state)
        other[name] = state[name] + RANK
        other["head.weight"] = other["embed.weight"]
        with pytest.raises(wl.RanksError, match="rank 1 has another checkpoint than rank 0"):
            wl.load(Tied, other, parallelize=fsdp(mesh(2)))
    # What lies elsewhere or otherwise in memory, and what nobody asks for, is no difference.
    turned = {key: value.t().contiguous().t() if value.dim() == 2 and RANK else value for key, value in state.items()}
    turned["unused"] = torch.full((3,), float(RANK))
    assert_same_state(wl.load(Tied, turned, strict=False, parallelize=fsdp(mesh(2))), wl.load(Tied, state))
    seeded = checkpoint_of(Tied, seed=RANK)
    assert_same_state(
        wl.load(Tied, seeded, parallelize=fsdp(mesh(2)), source_rank=0), wl.load(Tied, checkpoint_of(Tied, seed=0))
    )


def what_is_no_process_group_is_named():
    with pytest.raises(TypeError, match=r"mesh\.get_group\(\) .* found DeviceMesh"):
        wl.load(Tied, checkpoint_of(Tied), source_rank=0, process_group=mesh(2))


def a_rank_outside_the_group_is_refused():
    group = dist.new_group([0])
    state = checkpoint_of(Tied)
    for options in ({"source_rank": 0}, {"parallelize": lambda model: model}):
        if RANK == 0:
            assert torch.equal(wl.load(Tied, state, process_group=group, **options).scale, state["scale"])
            continue
        with pytest.raises(ValueError, match="rank 1 is no member of process_group"):
            wl.load(Tied, state, process_group=group, **options)


def seeds_that_nobody_gave_are_those_of_the_first_rank():
    state = checkpoint_of(Tied, *MISSING)
    reference = wl.load(Tied, state, strict=False, seed=0)
    torch.manual_seed(RANK)
    assert_same_state(wl.load(Tied, state, strict=False, parallelize=fsdp(mesh(2))), reference)
    for source_rank in (None, 0):
        deferred = wl.defer(Tied)
        model = deferred.load(state, strict=False, parallelize=fsdp(mesh(2)), source_rank=source_rank)
        assert_same_state(model, reference)
    with pytest.raises(wl.RanksError, match="rank 1 has another set of options than rank 0"):
        wl.defer(Tied, seed=RANK).load(state, strict=False, parallelize=fsdp(mesh(2)))


def an_error_of_one_rank_is_one_of_all():
    path = _saved("error.pt", checkpoint_of(Tied))

    def build():
        if RANK == 1:
            raise KeyError("only here")
        return Tied()

    expected, text = ((wl.RanksError, "rank 1: KeyError"), (KeyError, "only here"))[RANK]
    with pytest.raises(expected, match=text):
        wl.load(build, path, parallelize=fsdp(mesh(2)))
    with pytest.raises(wl.WeightliftError, match="rank 1: CheckpointNotFound" if RANK == 0 else "no checkpoint"):
        wl.load(Tied, path if RANK == 0 else "/nowhere", parallelize=fsdp(mesh(2)))


def the_store_does_not_grow():
    state = checkpoint_of(Tied)
    grid = mesh(2)
    store = dist.distributed_c10d._get_default_store()

    def loads():
        wl.load(Tied, state, parallelize=fsdp(grid))
        wl.load(Tied, state if RANK == 0 else None, parallelize=fsdp(grid), source_rank=0)
        wl.plan(Tied, state, source_rank=0)
        with pytest.raises(wl.RanksError):
            wl.load(Tied, state, strict=RANK == 0, parallelize=fsdp(grid))
        with pytest.raises(wl.WeightliftError):
            wl.load(Tied, state if RANK == 0 else "/nowhere", parallelize=fsdp(grid))
        dist.barrier()
        keys = set(store.list_keys())
        dist.barrier()
        return keys

    before = loads()
    assert not any("weightlift" in key for key in before)
    assert len(loads()) == len(before)


def a_failed_load_into_a_module_can_be_done_again():
    state = checkpoint_of(Tied)
    own = _own("again.pt")
    torch.save(state, own)
    os.utime(own, (1, 1))
    plan = wl.plan(fsdp(mesh(2))(Tied()), own, parallelize=lambda model: model)
    if RANK == 1:
        own.rename(own.with_suffix(".away"))
    with pytest.raises((wl.WeightliftError, OSError)):
        plan.execute()
    if RANK == 1:
        own.with_suffix(".away").rename(own)
    assert_same_state(plan.execute(), wl.load(Tied, state))


def a_file_that_breaks_for_one_rank_stops_all():
    state = checkpoint_of(Tied)
    own = _own("broken.pt")
    torch.save(state, own)
    os.utime(own, (1, 1))
    for source_rank in (None, 1):
        plan = wl.plan(Tied, own, parallelize=fsdp(mesh(2)), source_rank=source_rank, copy=True)
        if RANK == 1:
            os.truncate(own, 4000)
        with pytest.raises(wl.WeightliftError, match="rank 1: CheckpointChanged" if RANK == 0 else "changed"):
            plan.execute()
        torch.save(state, own)
        os.utime(own, (1, 1))


SCENARIOS = {
    run.__name__: run
    for run in (
        fsdp2_of_a_tied_model,
        the_plan_names_what_the_load_will_do,
        tensors_that_are_not_strided_stay_as_they_were_made,
        parameters_that_are_not_strided_are_nobodys_to_send,
        tensor_parallel_llama,
        ties_that_tensor_parallelism_gives_up_are_tied_again,
        fsdp2_llama,
        fsdp2_and_experts,
        every_byte_is_read_once_over_all_ranks,
        what_ranks_saved_together_is_read_as_it_is_needed,
        what_ranks_saved_as_safetensors_is_read_as_it_is_needed,
        every_byte_of_what_ranks_saved_together_is_read_once,
        no_rank_holds_the_model_on_the_way,
        a_quantised_model_comes_through_unchanged,
        shards_of_another_dim,
        tensors_merged_of_several_are_sharded,
        more_ranks_than_rows,
        dtypes_are_what_parallelize_sees,
        nothing_is_initialised_for_what_is_loaded,
        recurrent_modules_keep_their_lists,
        modules_that_have_dtensors_already,
        what_parallelize_spoils_is_said,
        tied_values_that_differ_are_refused,
        one_rank_reads_for_all,
        the_source_can_be_any_rank_and_a_mapping,
        another_engine_fills_the_other_ranks,
        a_tie_that_the_source_gives_up_is_given_up_by_all,
        what_another_engine_fills_takes_no_memory_before,
        accelerate_fills_the_other_ranks,
        accelerates_variables_name_the_source,
        ranks_that_differ_are_named,
        ranks_that_would_wait_for_one_another_are_named,
        mappings_that_differ_are_named,
        what_is_no_process_group_is_named,
        a_rank_outside_the_group_is_refused,
        seeds_that_nobody_gave_are_those_of_the_first_rank,
        an_error_of_one_rank_is_one_of_all,
        the_store_does_not_grow,
        a_failed_load_into_a_module_can_be_done_again,
        a_file_that_breaks_for_one_rank_stops_all,
    )
}
