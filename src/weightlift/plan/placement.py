"""Which dtype and which device each tensor ends with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightlift.options import CheckedDtype, LoadOptions
from weightlift.patterns import Patterns, prefixes


def dtype_of(
    fqns: Sequence[str], own: torch.dtype, source: torch.dtype | None, option: CheckedDtype
) -> torch.dtype:
    """The dtype of a value: ``own`` as the module was built, ``source`` as the checkpoint has it (None: missing).

    Only floating-point tensors change; the first pattern that matches one of the names decides.
    """
    if option is None or not own.is_floating_point:
        return own
    if isinstance(option, Patterns):
        pattern = option.first(fqns)
        return own if pattern is None else dtype_of(fqns, own, source, option[pattern])
    if isinstance(option, torch.dtype):
        return option
    return source if source is not None and source.is_floating_point else own


def device_of(fqn: str, own: str, options: LoadOptions) -> str:
    """The device of a value: the longest prefix of ``device_map`` that fits the name, ``device``, or the module's own.

    A module that was built on ``meta`` has no device of its own yet; its tensors come to the CPU.
    """
    if options.device_map is not None:
        for prefix in prefixes(fqn):
            if prefix in options.device_map:
                return str(options.device_map[prefix])
    elif options.device is not None:
        return str(options.device)
    return "cpu" if own == "meta" else own
