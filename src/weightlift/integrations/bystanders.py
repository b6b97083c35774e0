"""What another thread may have replaced while a model is built in this one."""

from __future__ import annotations

from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch


def _stays(frame: FrameType, args: Any, kwargs: Any) -> Any:
    """``parameter.to(device)`` in accelerate's ``init_empty_weights``: while any thread is within it, that moves the
    parameters of all threads' models, to ``meta`` mostly. Here they stay as they were made."""
    theirs = frame.f_globals.get("__name__") == "accelerate.big_modeling"
    return args[0] if theirs and frame.f_code.co_name == "register_empty_parameter" else NotImplemented


STAYING: Mapping[Any, Any] = {torch.Tensor.to: _stays}
"""What the recorder answers for it."""
