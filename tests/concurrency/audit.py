"""What the process looks like: every attribute of the libraries' modules and classes, and torch's ambient state."""

from __future__ import annotations

import builtins
import logging
import os
import random
import signal
import sys
import threading
import types
import warnings
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "huggingface_hub", "safetensors", "numpy")
PLAIN = (int, float, str, bytes, bool, type(None), torch.dtype, torch.device)


def attributes() -> dict[str, Any]:
    """``module:attribute`` and ``module:class.attribute`` → identity (or value, for plain ones)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at an attribute that is deprecated
        return _attributes()


def _attributes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in LIBRARIES and isinstance(module, types.ModuleType):
            _collect(name, module, found)
    _collect("builtins", builtins, found)
    return found


def _collect(name: str, module: types.ModuleType, found: dict[str, Any]) -> None:
    for attribute, value in list(vars(module).items()):
        found[f"{name}:{attribute}"] = _mark(value)
        if isinstance(value, type) and value.__module__ == name:
            for inner, member in list(vars(value).items()):
                if inner not in ("__dict__", "__weakref__", "__doc__"):
                    found[f"{name}:{attribute}.{inner}"] = _mark(member)


def _mark(value: Any) -> Any:
    return repr(value) if type(value) in PLAIN else id(value)


def ambient() -> dict[str, Any]:
    """State that any thread of the process would feel."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "rng": bytes(torch.get_rng_state().tolist()),
        "python rng": random.getstate(),
        "environment": dict(os.environ),
        "filters": tuple(map(str, warnings.filters)),
        "log level": logging.getLogger().level,
        "handlers": tuple(logging.getLogger().handlers),
        "signal": signal.getsignal(signal.SIGINT),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "cwd": os.getcwd(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names whose value changed. Names that are new belong to modules that were imported meanwhile."""
    return [
        f"{name}: {str(before[name])[:60]} → {str(after.get(name))[:60]}"
        for name in before
        if name not in after or after[name] != before[name]
    ]


def open_files() -> set[str]:
    """What the process has open."""
    folder = "/proc/self/fd"
    return {os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder) if os.path.lexists(f"{folder}/{fd}")}


def threads() -> set[str]:
    """Live threads by name."""
    return {thread.name for thread in threading.enumerate()}
