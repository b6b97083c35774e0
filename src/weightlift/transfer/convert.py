"""Copies on the CPU, in the calling thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Below 32,768 elements ATen does not split a copy over its own (OpenMP) threads. The workers are the parallelism: a
# team of threads for each of them would only get in the way, and setting the number of threads would be global state.
_SERIAL_ELEMENTS = 511 * 64


def copy_serially(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """``target.copy_(source)`` for every pair, converting dtypes, on the calling thread alone."""
    to: list[torch.Tensor] = []
    of: list[torch.Tensor] = []
    for target, source in zip(targets, sources, strict=True):
        if source.numel() <= _SERIAL_ELEMENTS:
            to.append(target)
            of.append(source)
        else:
            _split(target, source, to, of)
    if to:
        # One call for all: the loop runs without the interpreter lock.
        torch._foreach_copy_(to, of)


def _split(target: torch.Tensor, source: torch.Tensor, to: list[torch.Tensor], of: list[torch.Tensor]) -> None:
    rows = source.size(0)
    step = _SERIAL_ELEMENTS // (source.numel() // rows)
    if step >= 1:
        to += torch.split(target, step)
        of += torch.split(source, step)
        return
    for part, other in zip(target.unbind(0), source.unbind(0), strict=True):
        _split(part, other, to, of)
