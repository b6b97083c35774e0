"""Stepping outside whatever torch modes the caller has on, in the calling thread only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    """Tensor work of the library itself: no mode of the caller's sees or changes it, and autograd does not record."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield
