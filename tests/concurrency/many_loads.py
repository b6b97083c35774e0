"""Eight threads load a tied model again and again while a bystander builds modules. Run by test_threads.py in a process
of its own: ``python -m tests.concurrency.many_loads FOLDER THREADS LOADS``; prints what it saw as JSON.
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import accelerate  # noqa: F401  (its attributes are watched)
import torch
import transformers  # noqa: F401  (likewise)
from safetensors.torch import load_file, save_file
from tests.concurrency import watch
from torch import nn

import weightlift as wl


class Tied(nn.Module):
    """A small language model whose head is its embedding, with initialisers of every temper and a rotary table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(2)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 256, bias=False)
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, 32, 2).float() / 32)), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.orthogonal_(self.layers[0].linear1.weight)
        self.head.weight = self.embedding.weight


def prepare(folder: Path) -> None:
    torch.manual_seed(1)
    state = {name: value.clone() for name, value in Tied().state_dict().items() if name != "head.weight"}
    save_file(state, folder / "model.safetensors")


def faults(model: Tied, expected: dict[str, torch.Tensor]) -> list[str]:
    found = []
    if model.head.weight is not model.embedding.weight:
        found.append("untied")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta or value.dtype != torch.float32:
            found.append(f"{name}: {value.device} {value.dtype}")
        elif name in expected and not torch.equal(value, expected[name]):
            found.append(f"{name}: wrong values")
    if not torch.equal(model.inv_freq, 1.0 / (10000 ** (torch.arange(0, 32, 2).float() / 32))):
        found.append("inv_freq: wrong values")
    return found


def main() -> None:
    folder, thread_count, loads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    faulthandler.dump_traceback_later(400, exit=True)  # what hangs says where
    prepare(folder)
    # Copies: safetensors maps the file, and the count of mappings at the end is to be ours alone.
    expected = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    sys.setswitchinterval(1e-4)
    wrong: list[str] = []
    done = [0] * thread_count

    def worker(number: int) -> None:
        for _ in range(loads):
            try:
                found = faults(wl.load(Tied, folder, workers=2), expected)
            except Exception as error:
                found = [repr(error)]
            wrong.extend(found)
            done[number] += not found

    with watch.Watched() as watched:
        watch.on_threads(thread_count, worker)
    mapped = sum("model.safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines())
    watch.answer({"right": sum(done), "wrong": wrong[:5], "mapped": mapped, **watched.found})


if __name__ == "__main__":
    main()
