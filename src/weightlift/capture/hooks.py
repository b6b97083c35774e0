"""The two functions that stand in a module's hook dictionaries while somebody captures it, and how they get there.

They are functions of this module, so a model can be pickled and copied meanwhile. They find out for whom to work from a
context variable. Their key in the dictionaries is fixed: torch numbers its own handles with a counter that two threads
can read at once, and a new number each time would be a new guard to compiled code.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from weightlift.capture.session import Session, backward_id, open_sessions, running

HOOK_ID = -770_310
_NOTHING = object()

# By the id of a module, how many captures hold a hook on it. They hold the module, too, so the id is its own.
_before: dict[int, int] = {}
_after: dict[int, int] = {}
_elsewhere: set[int] = set()  # ids of hooked modules that ran where nobody captures: only for messages
_lock = threading.Lock()
_abandoned: deque[Session] = deque()


def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """The forward pre-hook: returns edited arguments or None."""
    if is_dynamo_compiling():  # a constant to whoever traces this: what is compiled now must not know of this capture
        return None
    sessions = open_sessions.get()
    if not sessions:
        if id(module) not in _before:
            _drop_copied(module)
        return None
    given = kwargs
    changed = False
    for session in sessions:
        actions = session.before.get(id(module))
        if actions is not None and not session.closed:
            for action in actions:
                edited = action.enter(session, module, args, kwargs or {})
                if edited is not None:
                    (args, kwargs), changed = edited, True
    if not changed:
        return None
    return (args, kwargs) if given is not None else args


def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = _NOTHING) -> Any:
    """The forward hook: returns an edited output or None.

    It is called without ``kwargs`` where no capture wants them, and by a forward that is under way while it is removed.
    """
    if is_dynamo_compiling():
        return None
    # The usual case first, and in as few steps as can be: a model's own work drives this out of the caches between any
    # two calls, so each thing that is looked at costs a wait for memory.
    forward = running.get()
    if forward is not None:
        action = forward.simple.get(id(module))
        if action is not None:
            value = kwargs if output is _NOTHING else output
            if isinstance(value, tuple) and action.index is not None:
                value = value[action.index] if -len(value) <= action.index < len(value) else None
            if value is not None and not (forward.attached if not is_grad_enabled() else backward_id() != -1):
                version = value._version if isinstance(value, Tensor) and not value.is_inference() else -1
                forward.raw.append((action, value, version, forward.number))
                return None
    return _after_forward(module, args, kwargs, output)


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> Any:
    sessions = open_sessions.get()
    if not sessions:
        if id(module) in _after:
            _elsewhere.add(id(module))
        else:
            _drop_copied(module)
        return None
    if output is _NOTHING:
        kwargs, output = {}, kwargs
    first = output
    for session in sessions:
        actions = session.after.get(id(module))
        if actions is not None and not session.closed:
            for action in actions:
                output = action.leave(session, module, args, kwargs, output)
    return None if output is first else output


def install(session: Session) -> None:
    """Puts the hooks in place, where they are not yet. Safe while other threads run these modules."""
    modules = session.modules
    with _lock:
        if _abandoned:
            _remove_abandoned()
        for key in session.before:
            module = modules[key]
            count = _before[key] = _before.get(key, 0) + 1
            if key in session.with_kwargs:
                module._forward_pre_hooks_with_kwargs[HOOK_ID] = True
            if count == 1 or HOOK_ID not in module._forward_pre_hooks:
                module._forward_pre_hooks[HOOK_ID] = before_forward
        for key in session.after:
            module = modules[key]
            count = _after[key] = _after.get(key, 0) + 1
            if key in session.with_kwargs:
                module._forward_hooks_with_kwargs[HOOK_ID] = True
            if count == 1 or HOOK_ID not in module._forward_hooks:
                module._forward_hooks[HOOK_ID] = after_forward


def remove(session: Session) -> None:
    """Takes back what `install` did for one capture; the last one takes the hooks off."""
    with _lock:
        if _elsewhere:
            session.elsewhere = _elsewhere.intersection(session.after)
        _remove(session)


def _remove(session: Session) -> None:
    modules = session.modules
    for key in session.before:
        count = _before[key] = _before[key] - 1
        if count == 0:
            del _before[key]
            _take_off_before(modules[key])
    for key in session.after:
        count = _after[key] = _after[key] - 1
        if count == 0:
            del _after[key]
            _take_off_after(modules[key])
            _elsewhere.discard(key)


def abandon(session: Session) -> None:
    """As `remove`, for a capture that was dropped while it was open. May be called at any moment, by the collector.

    If somebody is at work on the hooks just now, it may be this thread: then whoever comes next removes it.
    """
    _abandoned.append(session)
    if _lock.acquire(blocking=False):
        try:
            _remove_abandoned()
        finally:
            _lock.release()


def _remove_abandoned() -> None:
    while _abandoned:
        session = _abandoned.popleft()
        _remove(session)
        session.forget()


def _take_off_before(module: nn.Module) -> None:
    # The function first: without its entry in the other dictionary it would be called in another way.
    module._forward_pre_hooks.pop(HOOK_ID, None)
    module._forward_pre_hooks_with_kwargs.pop(HOOK_ID, None)


def _take_off_after(module: nn.Module) -> None:
    module._forward_hooks.pop(HOOK_ID, None)
    module._forward_hooks_with_kwargs.pop(HOOK_ID, None)


def _drop_copied(module: nn.Module) -> None:
    """A copy that was made of a model while it was captured took our hooks along; they leave when they first run."""
    with _lock:
        if id(module) not in _after:
            _take_off_after(module)
        if id(module) not in _before:
            _take_off_before(module)
