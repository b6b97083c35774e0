"""Batch norm within a constructor: what a dummy forward leaves in the running statistics, without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_aten = torch.ops.aten
Dispatch = Callable[[Any, Any, Any], Any]


def put_off(dispatch: Dispatch, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
    """Answer ``aten::native_batch_norm`` by calls that say what they read and write; ``dispatch`` records each.

    None where there are no such calls: it has to run at once. The results' bits are those of the call itself, but for
    what it saves for a backward pass in evaluation, where torch saves nothing on the CPU, and so nothing is here.
    """
    if len(args) != 8 or args[0].device.type != "cpu" or args[0].dtype not in (torch.float32, torch.float64):
        return None  # of halves ``meta`` takes the statistics for other dtypes than they are
    mean, variance, training = args[3:6]
    if not training:
        result = dispatch(_aten.batch_norm.default, (*args, torch.backends.cudnn.enabled), {})
        return result, args[0].new_empty(0), args[0].new_empty(0)
    if mean is None and variance is None:
        return dispatch(_aten._native_batch_norm_legit.no_stats, (*args[:3], *args[5:]), {})  # type: ignore[no-any-return]
    if mean is None or variance is None:
        return None
    *results, new_mean, new_variance = dispatch(_aten._native_batch_norm_legit_functional.default, args, {})
    dispatch(_aten.copy_.default, (mean, new_mean), {})
    dispatch(_aten.copy_.default, (variance, new_variance), {})
    return tuple(results)
