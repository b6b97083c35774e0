"""Loads as another system would: ``python -m tests.integration.other_system darwin|win32 FOLDER``.

Torch and the other libraries are imported as what they are. Then the name of the system changes, and what it lacks is
taken out of ``os`` and ``mmap``, so that weightlift is imported and runs there with plain allocations. The process is
this test's own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import huggingface_hub  # noqa: F401  (imported before the system changes its name)
import torch
import tqdm  # noqa: F401  (likewise)
from safetensors.torch import save_file
from torch import nn

_LACKING = {
    "darwin": (
        (os, ("preadv", "RWF_NOWAIT", "sched_getaffinity", "posix_fadvise")),
        (mmap, ("MADV_HUGEPAGE", "MAP_NORESERVE")),
    ),
    "win32": (
        (os, ("preadv", "pread", "RWF_NOWAIT", "sched_getaffinity", "posix_fadvise", "sysconf", "fork")),
        (mmap, ("MADV_HUGEPAGE", "MAP_NORESERVE", "MAP_PRIVATE", "MAP_ANONYMOUS", "PROT_READ", "PROT_WRITE")),
    ),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Linear(1200, 1200)  # above the size from which Linux gets huge pages
        self.small = nn.Linear(1200, 3)
        self.register_buffer("table", torch.linspace(0, 1, 7), persistent=False)
        nn.init.orthogonal_(self.small.weight)
        self.tied = self.big


def become(system: str) -> None:
    for module, names in _LACKING[system]:
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.platform = system

    def refuse(*_: object, **__: object) -> None:
        raise OSError("the other system has no such library")

    ctypes.CDLL = refuse  # type: ignore[assignment, misc]


def main(system: str, folder: Path) -> None:
    state = Net().state_dict()
    own = {name: value.clone() for name, value in state.items() if not name.startswith("tied")}
    save_file(own, folder / "model.safetensors")
    become(system)

    import weightlift as wl

    for options in ({}, {"copy": True}, {"dtype": torch.bfloat16}, {"workers": 1, "copy": True}, {"defer": False}):
        model = wl.load(Net, folder, **options)
        for name, value in own.items():
            assert torch.equal(model.state_dict()[name], value.to(model.state_dict()[name].dtype)), (options, name)
        assert model.tied is model.big
        assert torch.equal(model.table, torch.linspace(0, 1, 7).to(model.table.dtype))
    del own["small.weight"]
    save_file(own, folder / "model.safetensors")
    model = wl.load(Net, folder, strict=False)
    assert torch.allclose(model.small.weight @ model.small.weight.T, torch.eye(3), atol=1e-5)
    existing = Net()
    assert wl.load(existing, folder, strict=False) is existing
    assert torch.equal(existing.big.weight, own["big.weight"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
