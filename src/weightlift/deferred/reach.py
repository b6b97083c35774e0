"""Which state-dict hooks can get at a module: only for these does a rehearsal need doubles.

Many a hook renames keys and never looks at the module that it was registered on. That is read off its code: what names
neither the module nor anything that finds it by its frame, and holds no part of it, has no other way than those that
lead past doubles too (globals, attributes of other objects).
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from weightlift.deferred.doubles import content_of
from weightlift.deferred.walk import has_post_hooks, is_overridden

_WrappedHook: Any = torch.nn.modules.module._WrappedHook
_MADE_ANEW = (nn.Module, torch.Tensor, functools.partial, RemovableHandle, _WrappedHook)
# What gives a function its arguments by another way than their names.
_BY_FRAME = {"locals", "vars", "dir", "eval", "exec", "super", "__class__", "_getframe", "currentframe", "stack"}


def needs_double(module: nn.Module, *, post: bool = False) -> bool:
    """True when code that ``load_state_dict`` runs for a module may get at it. ``post``: the post hooks run, too."""
    if is_overridden(module) or (post and has_post_hooks(module)):
        return True
    return any(map(_reaches, module._load_state_dict_pre_hooks.values()))


def _reaches(hook: Any) -> bool:
    if type(hook) is not _WrappedHook:
        return _holds(hook)
    called, hidden = hook.hook, []
    if isinstance(called, types.MethodType):
        hidden.append(_holds(called.__self__))
        called = called.__func__
    hidden.append(bool(hook.with_module))
    if not any(hidden):
        return _holds(called)
    if type(called) is not types.FunctionType or _holds(called):
        return True
    code = called.__code__
    names = code.co_varnames[: code.co_argcount]
    if len(names) < len(hidden):
        return True  # ``*args``
    return any(is_hidden and _uses(code, name) for is_hidden, name in zip(hidden, names))


def _holds(value: Any) -> bool:
    """Whether `Doubles` might make something anew for what a function holds."""
    if isinstance(value, _MADE_ANEW):
        return True
    if isinstance(value, types.MethodType):
        return _holds(value.__self__) or _holds(value.__func__)
    if type(value) is not types.FunctionType:
        return False
    held = [content_of(cell) for cell in value.__closure__ or ()]
    held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    # A function in another's closure may lead back to it: what is not plain is taken for a module.
    return any(isinstance(item, (types.FunctionType, types.MethodType)) or _holds(item) for item in held)


@functools.lru_cache(maxsize=1024)
def _uses(code: types.CodeType, name: str) -> bool:
    """Whether code does anything with its argument ``name``."""
    if name in code.co_cellvars or not _BY_FRAME.isdisjoint((*code.co_names, *code.co_freevars)):
        return True
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return True
    # Some instructions name two variables at once.
    named = (item.argval for item in dis.get_instructions(code))
    return any(name == item or (isinstance(item, tuple) and name in item) for item in named)
