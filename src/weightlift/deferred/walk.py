"""The parts of a ``load_state_dict``: which modules have code of their own, a module's slots, its modules in order,
each child's part of the state."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook

from weightlift.deferred.inventory import Kind


def _loading_of(kind: type) -> list[object]:
    """Every ``_load_from_state_dict`` of a class and its bases, in the order in which they call each other."""
    return [found for base in kind.__mro__ if (found := base.__dict__.get("_load_from_state_dict")) is not None]


_PLAIN = _loading_of(nn.Module)
_BATCH_NORM, _INSTANCE_NORM = _loading_of(_NormBase), _loading_of(_InstanceNorm)
_SPECTRAL = SpectralNormLoadStateDictPreHook.__call__


def is_overridden(module: nn.Module) -> bool:
    """True when a module has a ``_load_from_state_dict`` of its own."""
    own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return own or "_load_from_state_dict" in module.__dict__


def is_bypassed(module: nn.Module) -> bool:
    """True when a module has a ``load_state_dict`` of its own: here its walk is gone through, and it is not called."""
    return type(module).load_state_dict is not nn.Module.load_state_dict or "load_state_dict" in module.__dict__


def has_state_hooks(module: nn.Module) -> bool:
    """True when ``load_state_dict`` would run code of this module's own on the state dict."""
    return is_overridden(module) or bool(module._load_state_dict_pre_hooks)


def fills_in_a_count(module: nn.Module) -> bool:
    """True for torch's batch norms, whose ``_load_from_state_dict`` only lets old files lack a count of batches."""
    return "_load_from_state_dict" not in module.__dict__ and _loading_of(type(module)) == _BATCH_NORM


def does_nothing(
    module: Any, prefix: str, names: Container[str], metadata: Mapping[str, Mapping[str, Any]]
) -> bool:
    """True when what a module has of its own does nothing for a state of these names and with this ``_metadata``: that
    of torch's norms has to do with names that files of old lack, or have, whatever their version."""
    if "_load_from_state_dict" in module.__dict__:
        return False
    local = metadata.get(prefix[:-1], {})
    if not all(_is_up_to_date(hook, prefix, names, local) for hook in module._load_state_dict_pre_hooks.values()):
        return False
    loading = _loading_of(type(module))
    if loading == _PLAIN:
        return True
    if loading not in (_BATCH_NORM, _INSTANCE_NORM):
        return False
    if module.track_running_stats:
        return prefix + "num_batches_tracked" in names
    return not (loading == _INSTANCE_NORM and any(prefix + name in names for name in ("running_mean", "running_var")))


def _is_up_to_date(hook: Any, prefix: str, names: Container[str], local: Mapping[str, Any]) -> bool:
    """True for the hook of torch's older spectral norm where a state is as it saves it today."""
    called = getattr(hook, "hook", None)
    if type(called) is not SpectralNormLoadStateDictPreHook or type(called.fn) is not SpectralNorm or hook.with_module:
        return False
    if type(called).__call__ is not _SPECTRAL or type(called.fn.name) is not str:
        return False
    versions = local.get("spectral_norm", {})
    if type(versions) is not dict:
        return False
    key = prefix + called.fn.name
    version = versions.get(f"{called.fn.name}.version")
    if version is None:
        return key not in names and all(f"{key}_{part}" in names for part in ("orig", "u", "v"))
    return type(version) is int and version >= 1


def has_post_hooks(module: nn.Module) -> bool:
    """True when ``load_state_dict`` would run code of this module's own after it."""
    return bool(module._load_state_dict_post_hooks)


def slots_of(module: nn.Module) -> list[tuple[str, Kind, torch.Tensor, bool]]:
    """Name, kind, tensor and persistence of a module's own slots, in ``state_dict`` order."""
    transient = module._non_persistent_buffers_set
    found: list[tuple[str, Kind, torch.Tensor, bool]] = []
    found += [(name, "parameter", item, True) for name, item in module._parameters.items() if item is not None]
    buffers = ((name, item) for name, item in module._buffers.items() if item is not None)
    return found + [(name, "buffer", item, name not in transient) for name, item in buffers]


def walk(module: nn.Module, prefix: str, find: Callable[[nn.Module], nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """A module and those below it with their prefixes, each as ``find`` has it."""
    found = find(module)
    yield prefix, found
    for name, child in found._modules.items():
        if child is not None:
            yield from walk(child, f"{prefix}{name}.", find)


def partition(state: dict[str, Any], prefix: str, module: nn.Module) -> dict[str, dict[str, Any]]:
    """The part of the state that each child gets."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        first, *rest = key[len(prefix) :].split(".", 1)
        if rest and first in module._modules and key.startswith(prefix):
            parts.setdefault(first, {})[key] = value
    return parts
