"""The functions that stand in a module's hook dictionaries while somebody captures it, and how they get there.

They are functions of this module, so a model can be pickled and copied meanwhile. They find out for whom to work from a
context variable. Their key in the dictionaries is fixed: torch numbers its own handles with a counter that two threads
can read at once, and a new number each time would be a new guard to compiled code.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from types import FrameType
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from weightlift.capture.forwards import NONE_DUE, Forward, nearest, running
from weightlift.capture.session import Session, Work, backward_id, open_sessions
from weightlift.capture.values import is_wrapped, version_of
from weightlift.locks import Lock

HOOK_ID = -770_310
FAILURE_ID = HOOK_ID - 1
_NOTHING = object()

# The template of each open capture. The captures hold the modules whose ids these know, so an id is its owner's.
# Replaced as a whole, under the lock: whoever looks at it needs none.
_open: tuple[Work, ...] = ()
_stepwise: tuple[Session, ...] = ()  # captures that were entered below generators
_elsewhere: set[int] = set()  # ids of hooked modules that ran where nobody captures: only for messages
_lock = Lock()
_abandoned: deque[Session] = deque()


def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """The forward pre-hook: returns edited arguments or None."""
    if is_dynamo_compiling():  # a constant to whoever traces this: what is compiled now must not know of this capture
        return None
    sessions = open_sessions.get()
    if not sessions:
        if not _is_hooked(module):
            _drop_copied(module)
        elif _stepwise:
            _stray(module, sessions)
        return None
    if _stepwise:
        _stray(module, sessions)
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
    if forward is None and id(module) in _elsewhere and not open_sessions.get():
        return None  # a bystander, as before
    if (
        forward is not None
        and not forward.asks_all
        and not (forward.attached if not is_grad_enabled() else backward_id() != -1)
    ):
        value = kwargs if output is _NOTHING else output
        due = forward.due
        if due[0] is module and type(value) is Tensor and not is_wrapped(value):
            try:
                if due[2] is None or _begin(forward, due[2], args):
                    forward.raw.append((due[1], value, value._version, forward.number))
                    forward.due = next(forward.rest, NONE_DUE)
                    return None
            except RuntimeError:  # an inference tensor, which counts no writes, in an ordinary forward
                pass
        action = forward.simple.get(id(module))
        if action is not None:
            if isinstance(value, tuple) and action.index is not None:
                value = value[action.index] if -len(value) <= action.index < len(value) else None
            if value is not None:
                forward.raw.append((action, value, version_of(value), forward.number))
                forward.passed(module)
                return None
    return _after_forward(module, args, kwargs, output)


def _begin(forward: Forward, action: Any, args: tuple[Any, ...]) -> bool:
    """Notes the first argument of the first layer, before its output, where that is all that came."""
    if forward.raw or not args or type(args[0]) is not Tensor or is_wrapped(args[0]):
        return False
    forward.raw.append((action, args[0], args[0]._version, forward.number))
    return True


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> Any:
    sessions = open_sessions.get()
    if not sessions:
        _elsewhere.add(id(module))
        if not _is_hooked(module):  # or not any more: asked once it is noted, so that whoever removes the hook sees it
            _elsewhere.discard(id(module))
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


def after_failure(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Stands at the models whose forwards are followed, as the last of their hooks. torch calls it after those that
    failed, too: they are dropped, also where a hook failed once the forward had ended.

    What fails must not be taken for what runs on: a model may catch it, or its parts be called next.
    """
    if is_dynamo_compiling():
        return
    caller, error = sys._getframe(1), sys.exc_info()[1]
    failed = error is not None and error.__traceback__ is not None and error.__traceback__.tb_frame is caller
    for session in open_sessions.get():
        if session.ended:
            # torch calls hooks from a function of its own, but not after a failure.
            forward = session.ended.pop(id(caller if failed else caller.f_back), None)
            if failed and forward is not None:
                session.drop(forward)
    if running.get() is not None:
        running.set(nearest())


def install(session: Session) -> None:
    """Puts the hooks in place. Safe while other threads run these modules."""
    global _open, _stepwise
    template, held = session.template, session.held
    with _lock.own:
        if _abandoned:
            _remove_abandoned()
        _open, session.installed = (*_open, template), True  # both or none, should an interrupt come
        if session.entered:
            _stepwise = (*_stepwise, session)
        for place in template.hooked_with_kwargs:
            held[place]._forward_pre_hooks_with_kwargs[HOOK_ID] = True
            held[place]._forward_hooks_with_kwargs[HOOK_ID] = True
        for place in template.hooked_models:
            held[place]._forward_hooks_always_called[FAILURE_ID] = True
            held[place]._forward_hooks[FAILURE_ID] = after_failure
        # Also where they stand already: somebody may have cleared a dictionary, or put another in its place.
        for place in template.hooked_before:
            hooks: dict[int, Any] = held[place]._forward_pre_hooks
            hooks[HOOK_ID] = before_forward
            if len(hooks) > 1:
                _move_to_end(hooks)
        for place in template.hooked_after:
            hooks = held[place]._forward_hooks
            hooks[HOOK_ID] = after_forward
            if len(hooks) > 1:
                _move_to_end(hooks)
        for place in template.hooked_models:
            _move_to_end(held[place]._forward_hooks, FAILURE_ID)


def _move_to_end(hooks: dict[int, Any], key: int = HOOK_ID) -> None:
    """After a hook that its user put on while another capture was open: what that one does is to be seen, too.

    In one step, as other threads may run the module just now; where somebody put a plain dictionary there is none.
    """
    if isinstance(hooks, OrderedDict):
        hooks.move_to_end(key)


def remove(session: Session) -> None:
    """Takes back what `install` did for one capture; the last one takes the hooks off."""
    with _lock.own:
        if _elsewhere:
            session.elsewhere = frozenset(_elsewhere.intersection(session.after))
        _remove(session)


def _remove(session: Session) -> None:
    global _open, _stepwise
    template, held = session.template, session.held
    if session.entered:
        _stepwise = tuple(other for other in _stepwise if other is not session)
    if not session.installed:  # it was interrupted before it got so far, or after this
        return
    place = _open.index(template)
    others = (*_open[:place], *_open[place + 1 :])
    _open, session.installed = others, False
    if template in others:
        return
    before, after, with_kwargs = template.hooked_before, template.hooked_after, template.hooked_with_kwargs
    models = template.hooked_models
    if others:  # what they want stays
        before = tuple(n for n in before if not any(id(held[n]) in other.before for other in others))
        after = tuple(n for n in after if not any(id(held[n]) in other.after for other in others))
        with_kwargs = tuple(n for n in with_kwargs if not any(id(held[n]) in other.with_kwargs for other in others))
        models = tuple(n for n in models if not any(id(held[n]) in other.models for other in others))
    # The functions first: without their entries in the other dictionaries they would be called in another way.
    for place in before:
        held[place]._forward_pre_hooks.pop(HOOK_ID, None)
    for place in after:
        held[place]._forward_hooks.pop(HOOK_ID, None)
    for place in models:
        held[place]._forward_hooks.pop(FAILURE_ID, None)
        held[place]._forward_hooks_always_called.pop(FAILURE_ID, None)
    for place in with_kwargs:
        held[place]._forward_pre_hooks_with_kwargs.pop(HOOK_ID, None)
        held[place]._forward_hooks_with_kwargs.pop(HOOK_ID, None)
    if _elsewhere:
        _elsewhere.difference_update([id(held[place]) for place in after])


def abandon(session: Session) -> None:
    """As `remove`, for a capture that was dropped while it was open. May be called at any moment, by the collector.

    If somebody is at work on the hooks just now, it may be this thread: then whoever comes next removes it.
    """
    _abandoned.append(session)
    lock = _lock.own
    if lock.acquire(blocking=False):
        try:
            _remove_abandoned()
        finally:
            lock.release()


def _remove_abandoned() -> None:
    while _abandoned:
        session = _abandoned.popleft()
        _remove(session)
        session.forget()


def _stray(module: nn.Module, known: tuple[Session, ...]) -> None:
    """Notes captures below a generator which runs this forward of their model, in a context that knows others alone.

    A thread pool gives each step of a generator a copy of the pool's own context.
    """
    waiting = [one for one in _stepwise if id(module) in one.template.models and one not in known]
    frame: FrameType | None = sys._getframe(2) if waiting else None
    while frame is not None:
        mark = id(frame), frame.f_code
        for session in waiting:
            if mark in session.entered:
                session.strayed |= {mark}
        frame = frame.f_back


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody captures it."""
    key = id(module)
    for template in _open:
        if key in template.after:
            return True
    return any(key in template.before for template in _open)


def _shares_hooks(module: nn.Module) -> bool:
    """Whether its hooks are those of a captured module: it is a shallow copy, as ``nn.DataParallel`` makes them."""
    own = module._forward_hooks, module._forward_pre_hooks
    return any(
        other._forward_hooks is own[0] or other._forward_pre_hooks is own[1]
        for template in _open
        for other in template.modules()
    )


def _drop_copied(module: nn.Module) -> None:
    """A copy that was made of a model while it was captured took our hooks along; they leave when they first run."""
    with _lock.own:
        if not _is_hooked(module) and not _shares_hooks(module):  # the functions first, as above
            module._forward_hooks.pop(HOOK_ID, None)
            module._forward_hooks.pop(FAILURE_ID, None)
            module._forward_pre_hooks.pop(HOOK_ID, None)
            module._forward_hooks_always_called.pop(FAILURE_ID, None)
            module._forward_hooks_with_kwargs.pop(HOOK_ID, None)
            module._forward_pre_hooks_with_kwargs.pop(HOOK_ID, None)
