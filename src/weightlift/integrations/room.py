"""Running a function of another library with other values for some of the names that it uses.

The function's code stays theirs, so that whatever the installed version's arguments mean, they mean here. It runs as a
function object of the call's own, whose global names are a copy in which a few stand for something else: the calls
that would patch the process, and those that build and fill a model. Nothing of the library is replaced, and no other
thread sees any of it.
"""

from __future__ import annotations

import builtins
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

_OURS = f"{Path(__file__).parents[1]}{os.sep}"
_shown: dict[str, dict[Any, Any]] = {}  # which warnings a module has given, for rooms of modules that gave none


def in_room(function: Any, names: Mapping[str, Any], imports: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """A function of the same code as ``function`` (wrappers around it are dropped) that finds ``names`` among its
    globals; ``imports`` are found by ``from … import`` statements within it, whatever the module."""
    inner = unwrapped(function)
    room = {**inner.__globals__, **names}
    room.setdefault("__warningregistry__", _shown.setdefault(inner.__module__, {}))
    if room.get("warnings") is warnings:
        room["warnings"] = _WARNINGS
    if imports:
        room["__builtins__"] = {**vars(builtins), "__import__": _importer(imports)}
    made = FunctionType(inner.__code__, room, inner.__name__, inner.__defaults__, inner.__closure__)
    made.__kwdefaults__ = inner.__kwdefaults__
    return made


def unwrapped(function: Any) -> FunctionType:
    """The innermost function of a method or of functions that wrap one another."""
    inner = getattr(function, "__func__", function)
    while hasattr(inner, "__wrapped__"):
        inner = getattr(inner.__wrapped__, "__func__", inner.__wrapped__)
    assert isinstance(inner, FunctionType), inner
    return inner


def _importer(imports: Mapping[str, Any]) -> Callable[..., Any]:
    def load(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:  # noqa: A002
        module = builtins.__import__(name, globals, locals, fromlist, level)
        if not fromlist or not any(item in imports for item in fromlist):
            return module
        return SimpleNamespace(
            **{item: imports[item] if item in imports else getattr(module, item) for item in fromlist}
        )

    return load


class Facade:
    """A class as another library's code sees it, whose ``from_pretrained`` is ``load``."""

    def __init__(self, cls: Any, load: Callable[..., Any]) -> None:
        self._cls = cls
        self._load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cls, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._cls(*args, **kwargs)

    @property
    def __module__(self) -> str:  # type: ignore[override]
        return str(self._cls.__module__)

    def from_pretrained(self, name: Any = None, /, *args: Any, **kwargs: Any) -> Any:
        return self._load(name, *args, **kwargs)


class Delegate:
    """Stands for an object, with some attributes of its own."""

    def __init__(self, original: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _warn(message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **kwargs: Any) -> None:
    """``warnings.warn`` which finds the caller that is meant: none of this library's functions is one."""
    level, frame = 2, sys._getframe(1)
    while stacklevel > 1 and frame.f_back is not None:
        frame = frame.f_back
        level += 1
        stacklevel -= not frame.f_code.co_filename.startswith(_OURS)
    warnings.warn(message, category, level, *args, **kwargs)


_WARNINGS = Delegate(warnings, warn=_warn)
