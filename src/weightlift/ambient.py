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
_Key, _KeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
_LAZY_VIEWS = _KeySet(_Key.Conjugate) | _KeySet(_Key.Negative) | _KeySet(_Key.ZeroTensor)


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
def lazy_views_as_they_are() -> Iterator[None]:
    """While a mode answers a call, torch takes lazily conjugated and negated tensors for what their memory holds."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    if not excluded.has(_Key.Conjugate):
        yield
        return
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded - _LAZY_VIEWS):
        yield


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    """Tensor work of the library itself: no mode of the caller's sees or changes it, and autograd does not record."""
    with (
        no_dispatch_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad(),
        lazy_views_as_they_are(),
    ):  # fmt: skip
        yield
