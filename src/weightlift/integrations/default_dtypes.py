"""Constructors that ask torch for the default dtype, or set it: no mode is shown that, and the answer is the process's.

So their code is looked at: that of a model's classes, and of the functions and classes that it names, as far as names
lead. Libraries whose models are known to be right are left out. The one form that the recorder serves is
``tensor.to(torch.get_default_dtype())``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from weightlift.deferred.doubles import content_of
from weightlift.integrations.exclusive import NotNative

_KNOWN = {"torch", "transformers", "diffusers", "weightlift", "numpy", "accelerate", "safetensors", "huggingface_hub"}
_ASKS = "get_default_dtype"
_OTHERS = {
    "set_default_dtype": "it sets the process's default dtype",
    "Thread": "a thread that it starts has the process's default dtype",
    "ThreadPoolExecutor": "a thread that it starts has the process's default dtype",
}
_CASTS = {"to", "type"}
_CONSTRUCT = {"__init__", "__new__", "__post_init__", "__call__"}


def refuse_asking(classes: Iterable[type]) -> None:
    """Raise `NotNative` for classes whose constructors may depend on what the process's default dtype is, in a load
    that has another one in mind."""
    reached = _Reached()
    for cls in classes:
        reached.add(cls)
    for function in reached.functions():
        names = _names(function.__code__)
        if _ASKS in names and not _only_casts(function):
            raise NotNative(f"torch.get_default_dtype() in {function.__qualname__}", "the answer is the process's")
        for name in _OTHERS.keys() & names:
            raise NotNative(f"{name} in {function.__qualname__}", _OTHERS[name])


class _Reached:
    """The functions that constructors may come to, by the names in their code."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._todo: list[FunctionType] = []
        self._names = set(_CONSTRUCT)
        self._methods: dict[str, list[Any]] = {}

    def functions(self) -> Iterator[FunctionType]:
        """All there are, each once; what they name is found meanwhile."""
        while self._todo:
            function = self._todo.pop()
            yield function
            names = _names(function.__code__)
            cells = [content_of(cell) for cell in function.__closure__ or ()]
            for value in (*(function.__globals__.get(name) for name in names), *cells):
                self.add(value)
                if isinstance(value, ModuleType) and not _is_known(value.__name__):
                    for name in names:
                        self.add(vars(value).get(name))
            for name in names - self._names:
                self._names.add(name)
                for method in self._methods.get(name, ()):
                    self.add(method)

    def add(self, value: Any) -> None:
        """Reach a function, or what makes objects of a class; nothing else."""
        if isinstance(value, type):
            for base in value.__mro__:
                self._add_class(base)
            return
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, property):
            value = value.fget
        while not isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__  # a cached function
        if isinstance(value, FunctionType) and id(value) not in self._seen and not _is_known(value.__module__):
            self._seen.add(id(value))
            self._todo.append(value)

    def _add_class(self, cls: type) -> None:
        if id(cls) in self._seen or _is_known(cls.__module__):
            return
        self._seen.add(id(cls))
        for name, value in vars(cls).items():
            self._methods.setdefault(name, []).append(value)
            if name in self._names:
                self.add(value)


def _is_known(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in _KNOWN


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """What a function's code names, functions within it included."""
    inner = [_names(item) for item in code.co_consts if isinstance(item, CodeType)]
    return frozenset(code.co_names).union(*inner)


def _only_casts(function: FunctionType) -> bool:
    """Whether a function asks for the default dtype in ``tensor.to(torch.get_default_dtype())`` alone, and casts
    nothing else, so that there is no doubt which dtype is the answer."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    casts = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in _CASTS]
    arguments = [item for call in casts for item in (*call.args, *(keyword.value for keyword in call.keywords))]
    asked = [call for call in calls if _is_asking(call.func)]
    mentioned = sum(_is_asking(node) for node in ast.walk(tree))
    return len(asked) == mentioned == len(casts) and all(any(call is item for item in arguments) for call in asked)


def _is_asking(node: ast.AST) -> bool:
    return getattr(node, "attr", None) == _ASKS or getattr(node, "id", None) == _ASKS
