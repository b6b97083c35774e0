"""What of a model's loading is not called here, and the models for which that would make a difference.

Where Diffusers saves no memory it hands each module its part of a state dict, as ``load_state_dict`` does, and the
module's own code may rename and compute. Here a plan stands for that, so the loads of such a model are not native.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from weightlift.deferred.inventory import has_extra_state
from weightlift.deferred.rewrite import has_post_hooks, is_overridden
from weightlift.integrations.exclusive import NotNative

_WHY = "Diffusers' loading calls it, this one would not"


def refuse_state_hooks(modules: Iterable[nn.Module], *, after: bool) -> None:
    """Raise `NotNative` where a module has code of its own that is called with the state dict; ``after``: or when all
    is loaded."""
    for module in modules:
        if is_overridden(module) and not _fills_in_a_count(module):
            what = "_load_from_state_dict"
        elif module._load_state_dict_pre_hooks:
            what = "hooks of load_state_dict"
        elif has_extra_state(module):
            what = "set_extra_state"
        elif after and has_post_hooks(module):
            what = "hooks after load_state_dict"
        else:
            continue
        raise NotNative(f"{type(module).__name__}: {what}", _WHY)


def _fills_in_a_count(module: Any) -> bool:
    """True for torch's batch norms, whose ``_load_from_state_dict`` only lets old files lack a count of batches: it
    keeps the value that it has, as all that is missing does here."""
    return isinstance(module, _NormBase) and type(module)._load_from_state_dict is _NormBase._load_from_state_dict
