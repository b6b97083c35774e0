"""Which files a module's memory is: what must not be cut or written to in place while the module lives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
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
    to are still the file's. Thread-safe; loads nothing. Raises TypeError for what is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, found {type(module).__name__}")
    known = _by_address(mappings())
    starts = [start for start, _, _ in known]
    found: dict[Path, list[str]] = {}
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    for fqn, tensor in named:
        address = _address(tensor)
        place = bisect_right(starts, address) - 1
        if address and place >= 0:
            _, end, path = known[place]
            if address < end:
                found.setdefault(path, []).append(fqn)
    return {path: tuple(names) for path, names in found.items()}


def _by_address(mappings: Sequence[tuple[int, int, Path]]) -> list[tuple[int, int, Path]]:
    """Start, end and file of mappings (the oldest first), in the order of their addresses. Where two overlap, the older
    one is gone and only its entry is not yet."""
    found: list[tuple[int, int, int, Path]] = []
    for start, age, size, path in sorted((start, age, size, path) for age, (start, size, path) in enumerate(mappings)):
        while found and start < found[-1][2]:
            if found[-1][1] > age:
                break
            found.pop()
        else:
            found.append((start, age, start + size, path))
    return [(start, end, path) for start, _, end, path in found]


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's bytes begin; 0 for one that has none on the CPU."""
    tensor = getattr(tensor, "_local_tensor", tensor)
    if is_lazy(tensor) or tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return 0
    return tensor.data_ptr()
