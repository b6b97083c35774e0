"""What of a model's loading is not called here, and the models for which that would make a difference.

Diffusers' own versions of these are replaced by a plan and by the recorder. A class of somebody else's that overrides
one of them means something by it, so its loads are not native. What else a class may override (``from_config``,
``load_config``, ``_get_no_split_modules``, ``eval``, …) is called.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from weightlift.deferred.inventory import has_extra_state, modules_of
from weightlift.deferred.walk import fills_in_a_count, has_post_hooks, is_overridden
from weightlift.integrations.exclusive import NotNative
from weightlift.integrations.not_native import override_of

LOADING_STEPS = ("_load_pretrained_model", "_set_default_torch_dtype", "_fix_state_dict_keys_on_load")
"""What ``from_pretrained`` asks of the class that is loaded."""

NAMING = ("state_dict", "_save_to_state_dict")
"""What decides, in every module of a model, under which names it is given values."""

_KNOWN = ("diffusers", "torch", "transformers")


def refuse_steps(cls: Any) -> None:
    """Raise `NotNative` for a model class that overrides a step of ``from_pretrained`` that is not called here."""
    _refuse(override_of(cls, LOADING_STEPS, _KNOWN))


def refuse_names(model: nn.Module) -> None:
    """Raise `NotNative` where a module of a model has code of its own that decides what is in a state dict. Diffusers'
    loading goes by the names in it, this one by those of parameters and buffers."""
    for module in modules_of(model):
        _refuse(override_of(type(module), NAMING, _KNOWN))
        if any(name in module.__dict__ for name in NAMING):
            _refuse(f"{type(module).__name__}: a state_dict of the object's own")
        hooks = (*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values())
        if any(_package(hook) not in _KNOWN for hook in hooks):
            _refuse(f"{type(module).__name__}: hooks of state_dict")


def _package(hook: Any) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]


def _refuse(what: str | None) -> None:
    if what is not None:
        raise NotNative(what, "Diffusers' loading calls it, this one would not")


def refuse_state_hooks(model: nn.Module, *, loads: bool) -> None:
    """Raise `NotNative` where a module of a model has code of its own that is called with the state dict, as Diffusers
    does where it saves no memory; ``loads``: it does so by calling the model's ``load_state_dict``."""
    if loads:
        _refuse(override_of(type(model), ("load_state_dict",), _KNOWN))
    for module in modules_of(model):
        # A count that an old file lacks stays what it is, as all that is missing does here.
        if is_overridden(module) and not fills_in_a_count(module):
            what = "_load_from_state_dict"
        elif module._load_state_dict_pre_hooks:
            what = "hooks of load_state_dict"
        elif has_extra_state(module):
            what = "set_extra_state"
        elif loads and has_post_hooks(module):
            what = "hooks after load_state_dict"
        else:
            continue
        _refuse(f"{type(module).__name__}: {what}")
