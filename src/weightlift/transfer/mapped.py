"""Which files a module's memory is: what must not be cut or written to in place while the module lives."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from weightlift.deferred.inventory import is_lazy
from weightlift.transfer.memory import mappings


def mapped_files(module: nn.Module) -> dict[Path, tuple[str, ...]]:
    """The files that this process mapped for ``module``, each with the names of the tensors that lie there now.

    Looks at the memory of the parameters and buffers (of DTensors: this rank's part), so it also knows what a cast, a
    ``.to()`` or an assignment has left. Empty for a module that lies in memory of its own, as after ``copy=True``.
    Only mappings that weightlift made are known. A tensor that was written to keeps its name: pages that nobody wrote
    to are still the file's. Thread-safe; loads nothing.
    """
    known = mappings()
    found: dict[Path, list[str]] = {}
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    for fqn, tensor in named:
        address = _address(tensor)
        path = next((path for start, size, path in known if address and start <= address < start + size), None)
        if path is not None:
            found.setdefault(path, []).append(fqn)
    return {path: tuple(names) for path, names in found.items()}


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's bytes begin; 0 for one that has none on the CPU."""
    tensor = getattr(tensor, "_local_tensor", tensor)
    if is_lazy(tensor) or tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return 0
    return tensor.data_ptr()
