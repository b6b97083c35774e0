"""Small models, and ways to spread them."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.trunc_normal_(self.up.weight, std=0.02)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tied(nn.Module):
    """Uneven sizes, a tied head, a buffer that no checkpoint holds and one that it does."""

    def __init__(self, width=30, layers=3, vocabulary=101):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.linspace(0, 1, width), persistent=False)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x):
        h = self.embed(x) + self.positions * self.scale
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


class Experts(nn.Module):
    """A mixture of experts as two fused tensors of one row an expert, as Mixtral has them."""

    def __init__(self, width=16, experts=6, layers=2):
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * width, width) * 0.05)
        self.down = nn.Parameter(torch.randn(experts, width, 2 * width) * 0.05)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 64)

    def forward(self, x):
        h = self.embed(x)
        weight = self.router(h).softmax(-1)
        inner = torch.relu(torch.einsum("bsw,efw->bsef", h, self.up))
        h = h + torch.einsum("bsef,ewf,bse->bsw", inner, self.down, weight)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def checkpoint_of(build, *left_out, seed=0):
    """A state dict of an ordinarily built model, the same on every rank, without the names that begin as said."""
    torch.manual_seed(seed)
    return {key: value.clone() for key, value in build().state_dict().items() if not key.startswith(left_out)}


def mesh(*shape, names=None):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def fsdp(mesh, **options):
    def parallelize(model):
        for layer in blocks_of(model):
            fully_shard(layer, mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    return parallelize


def blocks_of(model):
    return model.layers if hasattr(model, "layers") else model.model.layers


def tensor_parallel(mesh):
    def parallelize(model):
        for layer in blocks_of(model):
            if isinstance(layer, Block):
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            else:
                plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
                plan["self_attn.o_proj"] = RowwiseParallel()
                if hasattr(layer.mlp, "gate_proj"):
                    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
                    plan["mlp.down_proj"] = RowwiseParallel()
            parallelize_module(layer, mesh, plan)

    return parallelize


def expert_parallel(mesh):
    """Only where the weights lie; a forward would need a dispatcher of tokens."""

    def parallelize(model):
        for owner in model.modules():
            for name in ("up", "down", "gate_up_proj", "down_proj"):
                parameter = getattr(owner, name, None)
                if isinstance(parameter, nn.Parameter) and parameter.dim() == 3:
                    setattr(owner, name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))

    return parallelize


def both(first, second):
    def parallelize(model):
        first(model)
        second(model)

    return parallelize


def gathered(model):
    """The whole state, on every rank."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


def assert_same_state(model, reference):
    state = gathered(model)
    expected = reference.state_dict()
    assert list(state) == list(expected)
    wrong = [name for name, value in expected.items() if not torch.equal(state[name], value)]
    assert not wrong, wrong
    for (name, buffer), (_, value) in zip(model.named_buffers(), reference.named_buffers()):
        assert torch.equal(buffer, value), name


def losses(model, steps=20, vocabulary=60):
    """Training, on the same batches everywhere."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        tokens = torch.randint(0, vocabulary, (2, 9), generator=generator)
        output = model(tokens[:, :-1])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or not torch.isnan(_local(p.grad)).any() for p in model.parameters())
        optimizer.step()
        found.append(loss.item())
    return found


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
