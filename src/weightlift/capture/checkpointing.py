"""``torch.utils.checkpoint`` around a module: whether it is there, and how to work within it unseen."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import is_grad_enabled

_outer_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Running(Protocol):
    """A forward that runs, as far as it is looked at here."""

    @property
    def outer(self) -> Running | None:
        """The one around it."""

    @property
    def thread(self) -> int:
        """The thread that it began on."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""

    @property
    def grad(self) -> bool:
        """Whether autograd was on when it began."""


def checkpointed_region(forward: Running | None) -> str | None:
    """'reentrant' or 'other' if the caller runs within ``torch.utils.checkpoint``; also where that is within it.

    None where autograd is off around that, too: nothing is cut off or recomputed. ``forward``: the innermost one that
    runs.
    """
    module = sys.modules.get("torch.utils.checkpoint")
    if module is None:
        return None
    grad = is_grad_enabled() or _began_with_grad(forward)
    reentrant: CodeType = module.CheckpointFunction.forward.__code__
    found = None
    for frame in _calls(forward):
        if frame.f_code is reentrant and _attached(frame.f_locals["ctx"], grad):
            return "reentrant"
        if grad and frame.f_code is not reentrant and frame.f_code.co_filename == reentrant.co_filename:
            found = "other"
    return found


def unseen() -> AbstractContextManager[Any]:
    """For tensor work of ours within a region: what it saves for its backward is not the region's to count.

    The recomputation does not repeat it, so torch would miss tensors there, in the user's backward.
    """
    if not is_grad_enabled() or _outer_hooks(False) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Any) -> Any:
    return tensor


def _began_with_grad(forward: Running | None) -> bool:
    """Whether autograd was on when a forward began that runs; also where none runs."""
    if forward is None:
        return True
    while forward is not None and not forward.grad:
        forward = forward.outer
    return forward is not None


def _calls(forward: Running | None) -> Iterator[FrameType]:
    """Those that led here; in a context that was copied for another thread, those there, too, which wait for this."""
    frame: FrameType | None = sys._getframe(1)
    threads = {threading.get_ident()}
    while frame is not None or forward is not None:
        if frame is not None:
            yield frame
            frame = frame.f_back
        elif forward is not None:
            if forward.thread not in threads and not forward.done:
                threads.add(forward.thread)
                frame = sys._current_frames().get(forward.thread)
            forward = forward.outer


def _attached(region: Any, grad: bool) -> bool:
    """Whether autograd is on around a reentrant region; if no input needs a gradient, that is not to be seen in it."""
    return bool(region.next_functions) or (grad and not any(region.needs_input_grad))
