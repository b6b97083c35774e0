"""Stepping outside whatever torch modes the caller has on, in the calling thread only.

torch's own ways of entering and leaving dispatch modes also write flags of the process
(``TorchDispatchMode.__enter__``) or import the compiler (``_disable_current_modes``). Only the thread-local stack below
them is used here.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch

_stack_size = torch._C._len_torch_dispatch_stack
_pop = torch._C._pop_torch_dispatch_stack
_push = torch._C._push_on_torch_dispatch_stack
_mode_at = torch._C._get_dispatch_stack_at
_function_stack_size = torch._C._len_torch_function_stack
_function_mode_at = torch._C._get_function_stack_at
_functions = torch._C._get_torch_function_state  # type: ignore[attr-defined]
_set_functions = torch._C._set_torch_function_state  # type: ignore[attr-defined]
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


class _Ambient(NamedTuple):
    """What torch holds for a thread that any of the above changes."""

    modes: tuple[Any, ...]
    function_modes: tuple[Any, ...]
    functions: Any
    inference: bool
    grad: bool
    included: Any
    excluded: Any

    @classmethod
    def now(cls) -> _Ambient:
        """Look at the calling thread."""
        return cls(
            tuple([_mode_at(at) for at in range(_stack_size())]),
            tuple([_function_mode_at(at) for at in range(_function_stack_size())]),
            _functions(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )

    def restore(self) -> None:
        """Have the calling thread as it was."""
        while _stack_size():
            _pop(None)
        for mode in self.modes:
            _push(mode)
        while _function_stack_size():
            torch._C._pop_torch_function_stack()
        for mode in self.function_modes:
            torch._C._push_on_torch_function_stack(mode)
        _set_functions(self.functions)
        if torch.is_inference_mode_enabled() != self.inference:
            _enter_for_good(torch._C._InferenceMode(self.inference))
        torch._C._set_grad_enabled(self.grad)
        if torch._C._dispatch_tls_local_include_set() != self.included or (
            torch._C._dispatch_tls_local_exclude_set() != self.excluded
        ):
            _enter_for_good(torch._C._ForceDispatchKeyGuard(self.included, self.excluded))


_entered: list[Any] = []


def _enter_for_good(guard: Any) -> None:
    """What torch has no setter for. A guard that died would undo what it did, at any time."""
    _entered.append(guard)
    guard.__enter__()


class Undisturbed:
    """Around what enters such contexts: an interrupt may come as one is entered or left (Ctrl-C comes between any two
    steps of Python code), and what that skipped is made good here, while the error is on its way out.

    Without it this thread would go on under a recorder that nobody reads, or without autograd.
    """

    __slots__ = ("_before", "_handled")

    def __enter__(self) -> None:
        self._before = _Ambient.now()
        self._handled = sys.exc_info()[1]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or (isinstance(error, Exception) and _Ambient.now() == self._before):
            return
        # Contexts that were not left live in the frames of the traceback, and would be left whenever that dies.
        seen: BaseException | None = error
        while seen is not None and seen is not self._handled:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__context__
        if _Ambient.now() != self._before:
            self._before.restore()
