"""A 1.2 B Llama that two ranks saved by torch.distributed.checkpoint under FSDP2, into one process.

The peers are torch's own reader into a module that has its memory already, built without initialising anything, and, as
its documentation does it, ordinarily.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import llama, own_formats
from benchmarks.harness import OURS, Case, Ready, touch
from benchmarks.peers import Load

SAVED = "saved"
BF16 = torch.bfloat16


def write(folder: Path, scale: float) -> None:
    """The checkpoint as safetensors, and what two ranks make of it; and both of a tiny one."""
    llama.write(folder, scale, BF16)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(_save, (port, folder), nprocs=2)  # type: ignore[no-untyped-call]


def _save(rank: int, port: int, folder: Path) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for place in (folder, folder / llama.TINY):
        model = _class().from_pretrained(place, dtype=BF16)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        dcp.save({"model": model.state_dict()}, checkpoint_id=place / SAVED)
    dist.destroy_process_group()


def _class() -> type:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM  # type: ignore[no-any-return]


def weightlift(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig

    import weightlift as wl

    config = AutoConfig.from_pretrained(folder)
    saved = wl.open_checkpoint(folder / SAVED, within="model")
    return wl.load(lambda: _class().from_config(config), saved, dtype=dtype)  # type: ignore[attr-defined, no-any-return]


def uninitialised(folder: Path, dtype: torch.dtype) -> nn.Module:
    model = own_formats.empty(folder, dtype, "cpu")
    return _read(folder, model)


def ordinary(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return _read(folder, _class().from_config(config, dtype=dtype))  # type: ignore[attr-defined]


def _read(folder: Path, model: nn.Module) -> nn.Module:
    import torch.distributed.checkpoint as dcp

    dcp.load({"model": model.state_dict()}, checkpoint_id=folder / SAVED, no_dist=True)
    return model


def _ready(load: Load, folder: Path) -> Ready:
    load(folder / llama.TINY, BF16)

    def timed() -> nn.Module:
        model = load(folder, BF16)
        touch(model)
        return model

    return timed


CASES = (
    Case(
        "saved-by-ranks", "1.2 B Llama in bf16 that two ranks saved by torch.distributed.checkpoint, into one process",
        write,
        {
            OURS: partial(_ready, weightlift),
            "torch.distributed.checkpoint": partial(_ready, uninitialised),
            "construct + dcp.load": partial(_ready, ordinary),
        },
        target="≥ 1.0× the fastest peer",
    ),
)  # fmt: skip
