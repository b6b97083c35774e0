"""What accelerate says through the environment about who loads."""

from __future__ import annotations

import os


def efficient_loading_source() -> int | None:
    """The rank that alone is to load, where accelerate's FSDP is on with ``cpu_ram_efficient_loading``; else None.

    These are the variables that accelerate's launcher and plugin set and Transformers goes by; they count once a
    process group of several ranks is up. The value is what `weightlift.load` takes as ``source_rank``: afterwards
    ``Accelerator.prepare`` fills the other ranks.
    """
    if not (_is_set("ACCELERATE_USE_FSDP") and _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING")):
        return None
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return 0


def another_rank_loads() -> bool:
    """True on the ranks that `efficient_loading_source` leaves to be filled."""
    source = efficient_loading_source()
    if source is None:
        return False
    import torch.distributed as dist

    return dist.get_rank() != source


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")
