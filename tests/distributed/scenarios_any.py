"""Modules, ways to spread them, checkpoints and options made up at random, alike on every rank.

What is loaded in parts has to be, put together, what one process loads alone, laid out as ``parallelize`` lays out a
module that was built ordinarily.
"""

from __future__ import annotations

import functools
import os
import random
from collections import Counter

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.distributed.models import mesh
from tests.distributed.scenarios_two import FOLDER, RANK
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import weightlift as wl

FIRST = int(os.environ.get("WEIGHTLIFT_FIRST", "0"))
EXAMPLES = int(os.environ.get("WEIGHTLIFT_EXAMPLES", "40"))
SIZES = [1, 2, 3, 5, 7, 16, 33]
LAYERS = [
    lambda dice: nn.Linear(dice.choice(SIZES), dice.choice(SIZES), bias=dice.random() < 0.5),
    lambda dice: nn.Embedding(dice.choice(SIZES), dice.choice(SIZES)),
    lambda dice: nn.LayerNorm(dice.choice(SIZES)),
    lambda dice: nn.Conv1d(dice.choice(SIZES), dice.choice(SIZES), dice.choice([1, 3])),
    lambda dice: nn.BatchNorm1d(dice.choice(SIZES)),
    lambda dice: nn.GRU(dice.choice(SIZES), dice.choice(SIZES)),
    lambda dice: nn.ParameterList(
        [torch.randn([dice.choice(SIZES) for _ in range(dice.randint(1, 4))]) * 3 for _ in range(dice.randint(1, 2))]
    ),
]


class Made(nn.Module):
    """Blocks of a few layers each; names that are tied, buffers, halves, what is computed from weights."""

    def __init__(self, seed):
        super().__init__()
        dice = random.Random(seed)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(dice.choice(LAYERS)(dice) for _ in range(dice.randint(1, 3))))
            for _ in range(dice.randint(1, 3))
        )
        self.first = nn.Linear(6, 10)
        if dice.random() < 0.4:
            self.tied = nn.Linear(6, 10)
            self.tied.weight = self.first.weight
        if dice.random() < 0.3:
            self.computed = nn.Parameter(self.first.weight.detach() * 2 + 1)
        if dice.random() < 0.1:
            self.turned = nn.Parameter(torch.randn(4, 9).t())
        if dice.random() < 0.3:
            self.frozen = nn.Parameter(torch.randn(8, 3), requires_grad=False)
        if dice.random() < 0.3:
            self.blocks[0].to(torch.bfloat16)
        self.register_buffer("table", torch.arange(5.0).outer(torch.arange(3.0)), persistent=dice.random() < 0.5)
        self.register_buffer("noise", torch.randn(7), persistent=dice.random() < 0.5)


@functools.cache
def meshes(ranks):
    """A mesh of two axes and one of one axis. Each has groups with threads of their own, so there are no more."""
    shape = (2, ranks // 2) if ranks > 2 else (1, 2)
    return mesh(*shape, names=("a", "b")), mesh(ranks, names=("line",))


def spread(seed, ranks):
    """A function for ``parallelize``, and whether it gives back another module."""
    dice = random.Random(seed + 1)
    kind = dice.choice(["fsdp", "fsdp", "fsdp", "tensor", "both", "by hand", "nothing"])
    plane, line = meshes(ranks)
    choices = [dice.random() for _ in range(64)]

    def fully(model, over):
        draw = iter(choices)
        options = {"reshard_after_forward": next(draw) < 0.5}
        if next(draw) < 0.3:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        if next(draw) < 0.3:
            options["shard_placement_fn"] = lambda parameter: Shard(last(parameter, over))
        ignored = {model.frozen} if hasattr(model, "frozen") and next(draw) < 0.5 else set()
        for block in model.blocks:
            if next(draw) < 0.6:
                fully_shard([block] if next(draw) < 0.3 else block, mesh=over, **options)
        if next(draw) < 0.8:
            fully_shard(model, mesh=over, ignored_params=ignored or None, **options)

    def tensor(model, over):
        draw = iter(choices[20:])
        for name, module in list(model.named_modules()):
            # What is less than a row for each rank torch does not put together again: its ranks wait for ever.
            many = isinstance(module, nn.Linear) and name != "tied" and min(module.weight.shape) >= ranks
            if many and next(draw) < 0.6:
                style = ColwiseParallel() if next(draw) < 0.5 else RowwiseParallel()
                parallelize_module(model, over, {name: style})

    def by_hand(model):
        draw, tied = iter(choices), getattr(model, "tied", None)
        for module in list(model.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if next(draw, 1.0) < 0.5 and module is not tied and not isinstance(module, nn.GRU):
                    places = [
                        Shard(int(next(draw, 0.0) * parameter.dim())) if next(draw, 1.0) < 0.6 else Replicate()
                        for _ in range(plane.ndim)
                    ]
                    made = nn.Parameter(distribute_tensor(parameter.detach(), plane, places))
                    made.requires_grad_(parameter.requires_grad)
                    setattr(module, name, made)

    def parallelize(model):
        if kind == "fsdp":
            fully(model, plane if ranks > 2 and choices[60] < 0.3 else line)
        elif kind == "tensor":
            tensor(model, line)
        elif kind == "both":
            tensor(model, plane["b"])
            fully(model, plane["a"])
        elif kind == "by hand":
            by_hand(model)

    return kind, parallelize


def last(parameter, over):
    """The last dim that can be sharded evenly, as other dims than the first must be."""
    ranks = over.size(-1)
    even = [dim for dim in range(1, parameter.dim()) if parameter.shape[dim] % ranks == 0]
    return even[-1] if even else 0


def named(module):
    found = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def looks(tensor):
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    spread = (tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else None
    return type(tensor), tensor.dtype, tensor.shape, tensor.requires_grad, local.shape, spread, tensor.is_leaf


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def state_of(seed, dice, ordinary):
    """New values for most names, the same ones for tied names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in ordinary.state_dict().items():
        new = torch.randn(value.shape, generator=generator) * 5 if value.is_floating_point() else value + 3
        state[name] = new.to(value.dtype)
    if "tied.weight" in state:
        state["tied.weight"] = state["first.weight"].clone()
    return {name: value for name, value in state.items() if dice.random() > 0.15}


def given(dice, state, path, source):
    """What a rank passes as the checkpoint: where another rank is the source, it need not have it."""
    if dice.random() < 0.3:
        return state
    absent = dice.random() < 0.5
    return "/nowhere" if absent and source not in (None, RANK) else path


def ties(module):
    tensors = named(module)
    return [[other for other in tensors if tensors[other] is tensor] for tensor in tensors.values()]


def one(seed):
    """One made-up load: which kind it was, and what is wrong on this rank."""
    ranks = dist.get_world_size()
    dice = random.Random(seed + 2)
    kind, parallelize = spread(seed, ranks)
    torch.manual_seed(seed)
    laid_out = Made(seed)
    ordinary = {name: tensor.detach().clone() for name, tensor in named(laid_out).items()}
    state = state_of(seed, dice, laid_out)
    options = {
        "strict": False,
        "dtype": dice.choice([None, None, None, "auto", torch.float32]),
        "copy": dice.random() < 0.5,
        "memory_budget_bytes": dice.choice([None, None, 4096]),
    }
    path = FOLDER / f"any{seed}.{dice.choice(['pt', 'safetensors'])}"
    if RANK == 0:
        torch.save(state, path) if path.suffix == ".pt" else save_file(state, path)
    dist.barrier()
    try:
        parallelize(laid_out)
    except Exception as error:
        return f"torch refuses it: {error!r:.60}", []
    source = dice.choice([None, None, 0, ranks - 1])
    checkpoint = given(dice, state, path, source)
    ours = wl.load(lambda: Made(seed), checkpoint, parallelize=parallelize, source_rank=source, seed=3, **options)
    alone = named(wl.load(lambda: Made(seed), path, seed=3, **options))
    loaded, layout = named(ours), named(laid_out)
    wrong = [pair for pair in zip(ties(ours), ties(laid_out), strict=True) if pair[0] != pair[1]]
    # Of parts without elements torch does not always make the whole tensor again.
    told = {name for name, tensor in layout.items() if torch.equal(whole(tensor), ordinary[name])}
    for name, tensor in loaded.items():
        if options["dtype"] is None and looks(tensor) != looks(layout[name]):
            wrong.append((name, looks(tensor), looks(layout[name])))
        if not torch.equal(whole(tensor), alone[name].detach()) and name in told:
            wrong.append((name, whole(tensor), alone[name]))
    if dice.random() < 0.5 and source is None:
        wl.load(laid_out, path, strict=False, copy=options["copy"])
        first = state.get("first.weight", state.get("tied.weight"))
        values = {**ordinary, **state}
        if first is not None and layout.get("tied.weight") is layout["first.weight"]:
            values |= {"first.weight": first, "tied.weight": first}
        after = {name: whole(tensor) for name, tensor in named(laid_out).items()}
        wrong += [name for name, tensor in after.items() if not torch.equal(tensor, values[name]) and name in told]
    return kind, wrong


def any_spread():
    count = Counter()
    for seed in range(FIRST, FIRST + EXAMPLES):
        print("seed", seed, flush=True)
        kind, wrong = one(seed)
        count[kind] += 1
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, wrong)
        assert not any(everywhere), (seed, kind, everywhere)
    print(count)


def a_weight_of_less_than_a_row_for_each_rank():
    plane, _ = meshes(dist.get_world_size())

    def parallelize(model):
        parallelize_module(model, plane["b"], {"0": RowwiseParallel()})
        fully_shard(model, mesh=plane["a"])

    def build():
        return nn.Sequential(nn.Linear(1, 1))

    laid_out, state = build(), {"0.weight": torch.full((1, 1), 5.0), "0.bias": torch.full((1,), 6.0)}
    parallelize(laid_out)
    loaded = wl.load(build, state, parallelize=parallelize)
    for name, tensor in named(loaded).items():
        assert looks(tensor) == looks(named(laid_out)[name]), name
        assert not tensor.to_local().numel() or tensor.to_local().item() == state[name].item()


SCENARIOS = {run.__name__: run for run in (any_spread, a_weight_of_less_than_a_row_for_each_rank)}
