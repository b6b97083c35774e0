"""``--model module:callable``: find what builds the model, and say in one line what is wrong with a wrong one."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from weightlift.cli.arguments import UsageError
from weightlift.errors import WeightliftError
from weightlift.plan.nearest import nearest_names


def builder(spec: str) -> Callable[[], nn.Module]:
    """The callable that ``spec`` names. What it raises when called becomes a `UsageError`, and so does what isn't a
    module.
    """
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"--model {spec!r}: expected module:callable, as in my_package.models:build")
    if "/" in module_name or os.sep in module_name or module_name.endswith(".py") or module_name.startswith("."):
        text = "is not the name of a module; give it as it is imported, my_package.models and not its file"
        raise UsageError(f"--model {spec!r}: {module_name} {text}")
    target = _attribute(spec, _module(spec, module_name), attribute)
    if isinstance(target, nn.Module):
        raise UsageError(f"--model {spec!r}: is a module; give a callable that builds one, as in `lambda: MyModel()`")
    if not callable(target):
        raise UsageError(f"--model {spec!r}: {attribute} is not callable, it is {_a(type(target).__name__)}")
    _require_no_arguments(spec, target)
    return _checked(spec, target)


def _module(spec: str, name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # a script's path begins with the script's folder, not the current one
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            where = "in the current directory or installed"
            raise UsageError(f"--model {spec!r}: there is no module {missing} {where}") from error
        raise UsageError(f"--model {spec!r}: importing {name} failed: {error}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"--model {spec!r}: importing {name} failed: {_line(error)}") from error


def _attribute(spec: str, module: Any, path: str) -> Any:
    target = module
    for name in path.split("."):
        try:
            target = getattr(target, name)
        except AttributeError as error:
            owner = getattr(target, "__name__", type(target).__name__)
            near = nearest_names(name, [other for other in dir(target) if not other.startswith("_")])
            hint = f"; it has {', '.join(near)}" if near else ""
            raise UsageError(f"--model {spec!r}: {owner} has no {name}{hint}") from error
    return target


def _require_no_arguments(spec: str, target: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # of a builtin: calling it will tell
        return
    try:
        signature.bind()
    except TypeError as error:
        text = ", ".join(
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        )
        raise UsageError(f"--model {spec!r}: needs arguments ({text}); give a callable that takes none") from error


def _checked(spec: str, target: Callable[[], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        try:
            built = target()
        except WeightliftError:
            raise
        except (Exception, SystemExit) as error:
            raise UsageError(f"--model {spec!r}: building it failed: {_line(error)}") from error
        if not isinstance(built, nn.Module):
            raise UsageError(f"--model {spec!r}: must return a torch.nn.Module, found {_a(type(built).__name__)}")
        return built

    return build


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"
