"""Constructors with calls that fail on the CPU and not where their own library builds.

There most tensors are on ``meta``, which knows shapes only: ``orthogonal_`` of bfloat16 passes, for which the CPU has
no kernel, and so does what only values are wrong for. The recorder makes such a call as it is, and torch refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from weightlift.deferred.construct import CurrentLoad, construct
from weightlift.deferred.defaults import WantedDtype
from weightlift.deferred.functions import Answer
from weightlift.deferred.recorder import Recorder
from weightlift.integrations.exclusive import NotNative


def built(
    make: Callable[[], nn.Module],
    load: CurrentLoad,
    *,
    default_dtype: WantedDtype = None,
    answers: Mapping[Any, Answer] | None = None,
) -> tuple[nn.Module, Recorder]:
    """`construct`, deferred. Raises NotNative where torch refuses a call, whatever the constructor makes of that: its
    own library tells whether there is an error, and goes on as the constructor does there."""
    try:
        model, recorder = construct(make, load, default_dtype=default_dtype, answers=answers)
        assert recorder is not None
        if recorder.failed is None:
            return model, recorder
        failed = recorder.failed
    except RuntimeError as error:  # NotImplementedError is one
        failed = str(error)
    said = failed.strip().partition("\n")[0]
    raise NotNative(f"a constructor with a call that torch refuses: {said}", "on the meta device it may pass")
