"""A model sharded with FSDP2: every rank reads only the bytes that it keeps.

    torchrun --nproc-per-node 2 examples/fsdp2.py

It runs on the CPU (gloo); with NCCL only the device and the backend differ.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import weightlift as wl


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 256, layers: int = 4):
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.linspace(0, 1, width), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def parallelize(model: Model) -> None:
    """What one would write for any module. It is called with the module's shapes; nothing has been read yet."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def start() -> None:
    """torchrun says who is who; without it, this is the only rank."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def main() -> None:
    start()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        path = os.path.join(folder[0], "model.pt")
        if rank == 0:
            torch.save(Model().state_dict(), path)
        dist.barrier()

        model = wl.load(Model, path, parallelize=parallelize)
        local = sum(parameter.to_local().nbytes for parameter in model.parameters())
        whole = sum(parameter.nbytes for parameter in model.parameters())
        print(f"rank {rank} read and holds {local:,} of {whole:,} bytes")
        assert local < 1.1 * whole / ranks
        assert model.head.weight is model.embed.weight  # tied as ever

        # Only one rank can see the files: it reads, and streams to each of the others what that one keeps.
        model = wl.load(Model, path if rank == 0 else "not there", parallelize=parallelize, source_rank=0, copy=True)

    loss = model(torch.randint(0, 1000, (2, 16))).logsumexp(-1).mean()
    loss.backward()
    print(f"rank {rank} loss {loss.item():.3f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
