"""What is special about modules under FSDP2, known by what they have: torch.distributed is not imported for this."""

from __future__ import annotations

from torch import nn

from weightlift.deferred.inventory import modules_of


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
