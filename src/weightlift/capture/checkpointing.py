"""``torch.utils.checkpoint`` around a module: whether it is there, and how to work within it unseen."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import is_grad_enabled
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode_temporarily

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

    def frame(self) -> FrameType | None:
        """That which calls its model, as long as it runs."""


def checkpointed_region(forward: Running | None) -> tuple[str | None, bool]:
    """'reentrant' or 'other' if the caller runs within ``torch.utils.checkpoint``; also where that is within it. And
    whether that is sure: of a reentrant region whose inputs need no gradient it can't be seen if autograd is on around.

    None where autograd is off around that, too: nothing is cut off or recomputed. ``forward``: the innermost one that
    runs.
    """
    module = sys.modules.get("torch.utils.checkpoint")
    if module is None:
        return None, True
    on, unknown = is_grad_enabled(), _began_with_grad(forward)
    reentrant: CodeType = module.CheckpointFunction.forward.__code__
    found = None
    for frame, around in _calls(forward):
        if frame.f_code.co_filename != reentrant.co_filename:
            continue
        grad = on or (unknown if around is None else around.grad)
        if frame.f_code is not reentrant:
            found = "other" if grad else found
        elif (region := frame.f_locals["ctx"]).next_functions:
            return "reentrant", True
        elif grad and not any(region.needs_input_grad):
            return "reentrant", False
    return found, True


def unseen() -> AbstractContextManager[Any]:
    """For tensor work of ours within a region: what it saves for its backward is not the region's to count.

    The recomputation does not repeat it, so torch would miss tensors there, in the user's backward. Where a region
    chooses what it keeps, by the operators' order, others would even get the results of ours.
    """
    hooked = is_grad_enabled() and _outer_hooks(False) is not None
    if torch._C._len_torch_dispatch_stack() and _keeps_results():
        return _out_of_sight(hooked)
    return torch.autograd.graph.saved_tensors_hooks(_same, _same) if hooked else nullcontext()


def _keeps_results() -> bool:
    """Whether this is within a region with ``create_selective_checkpoint_contexts``."""
    kinds = getattr(sys.modules.get("torch.utils.checkpoint"), "_CachingTorchDispatchMode", ())
    return any(isinstance(mode, kinds) for mode in _get_current_dispatch_mode_stack())


@contextmanager
def _out_of_sight(hooked: bool) -> Iterator[None]:
    with ExitStack() as left:
        while _keeps_results():
            left.enter_context(_pop_mode_temporarily())
        if hooked:
            left.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        yield


def _same(tensor: Any) -> Any:
    return tensor


def _began_with_grad(forward: Running | None) -> bool:
    """Whether autograd was on when a forward began that runs; also where none runs."""
    if forward is None:
        return True
    while forward is not None and not forward.grad:
        forward = forward.outer
    return forward is not None


def _calls(forward: Running | None) -> Iterator[tuple[FrameType, Running | None]]:
    """Those that led here, each with the innermost forward around it.

    In a context that was copied for another thread, those there, too, which wait for this.
    """
    frame: FrameType | None = sys._getframe(1)
    threads = {threading.get_ident()}
    while frame is not None:
        while forward is not None and (forward.done or forward.frame() in (frame, None)):
            forward = forward.outer
        yield frame, forward
        frame = frame.f_back
        if frame is None:
            while forward is not None and (forward.done or forward.thread in threads):
                forward = forward.outer
            if forward is not None:
                threads.add(forward.thread)
                frame = sys._current_frames().get(forward.thread)
