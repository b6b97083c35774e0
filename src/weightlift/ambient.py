"""Stepping outside whatever torch modes the caller has on, in the calling thread only.

torch's own ways of entering and leaving dispatch modes also write flags of the process
(``TorchDispatchMode.__enter__``) or import the compiler (``_disable_current_modes``). Only the thread-local stack below
them is used here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_stack_size = torch._C._len_torch_dispatch_stack
_pop = torch._C._pop_torch_dispatch_stack
_push = torch._C._push_on_torch_dispatch_stack


@contextlib.contextmanager
def no_dispatch_modes() -> Iterator[None]:
    """None of the thread's dispatch modes."""
    hidden = [_pop(None) for _ in range(_stack_size())]
    try:
        yield
    finally:
        for mode in reversed(hidden):
            _push(mode)


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    """Tensor work of the library itself: no mode of the caller's sees or changes it, and autograd does not record."""
    with no_dispatch_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield
