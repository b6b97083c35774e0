"""What is special about modules under FSDP, known by what they have: torch.distributed is not imported for this."""

from __future__ import annotations

from torch import nn

from weightlift.deferred.inventory import Inventory, modules_of
from weightlift.errors import PlanError, Problem


def has_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module or one within it."""
    return any(hasattr(child, "_get_fsdp_state") for child in modules_of(module))


def reshard(module: nn.Module) -> None:
    """Have a module's parameters sharded, as ``load_state_dict`` and ``state_dict`` do first.

    After a forward that no backward follows, FSDP2's root holds unsharded parameters, other objects: what is written
    to them is lost.
    """
    for child in modules_of(module):
        if hasattr(child, "_get_fsdp_state") and callable(undo := getattr(child, "reshard", None)):
            undo()


def refuse_flat(inventory: Inventory) -> None:
    """Raise PlanError for modules under FSDP1 (``FullyShardedDataParallel``).

    Their parameters are parts of flat ones, and their state-dict hooks gather those in place, which can't be rehearsed.
    """
    named = zip(inventory.prefixes, inventory.modules)
    flat = next((prefix for prefix, child in named if "_fsdp_wrapped_module" in child._modules), None)
    if flat is not None:
        hint = "load before it is wrapped, or use the wrapped module's own load_state_dict"
        problem = Problem("FSDP1 has made flat parameters of it", fqn=flat[:-1] or None, hint=hint)
        raise PlanError(f"{type(inventory.module).__qualname__} can't be loaded into; nothing was changed", [problem])
