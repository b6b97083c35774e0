"""Building a model for its library, and the constructors that are left to that.

Libraries build on ``meta``, or most of it, which knows shapes only: ``orthogonal_`` of bfloat16 passes, for which the
CPU has no kernel, and so does what only values are wrong for. The recorder makes such a call as it is, and torch
refuses it. And they set the process's default dtype, which is not done here: code that asks for it would be misled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightlift.deferred.construct import CurrentLoad, construct, extend
from weightlift.deferred.defaults import WantedDtype
from weightlift.deferred.functions import Answer
from weightlift.deferred.inventory import Inventory
from weightlift.deferred.recorder import Recorder
from weightlift.integrations.default_dtypes import refuse_asking
from weightlift.integrations.exclusive import NotNative


@dataclass(frozen=True, slots=True)
class Built:
    """A model that was built deferred, with the recorder of its tapes, for a load. ``classes`` are those of the
    modules that it was built of."""

    model: Any
    recorder: Recorder
    load: CurrentLoad
    classes: frozenset[type]

    def extend(self, work: Callable[[], None]) -> Inventory:
        """See `weightlift.deferred.construct.extend`."""
        return extend(self.model, self.recorder, self.load, work)


def built(
    cls: type,
    make: Callable[[], nn.Module],
    load: CurrentLoad,
    *,
    default_dtype: WantedDtype = None,
    answers: Mapping[Any, Answer] | None = None,
) -> Built:
    """`construct` an object of ``cls``, deferred. Raises NotNative where the constructor would not find what it finds
    in its own library."""
    differs = default_dtype not in (None, torch.get_default_dtype())
    if differs:
        refuse_asking([cls])
    inventory, recorder = _unless_refused(lambda: construct(make, load, default_dtype=default_dtype, answers=answers))
    classes = frozenset(map(type, inventory.modules))
    if differs:
        refuse_asking(classes)
    return Built(inventory.module, recorder, load, classes)


def _unless_refused(build: Callable[[], tuple[Inventory, Recorder | None]]) -> tuple[Inventory, Recorder]:
    """Raises NotNative where torch refuses a call, whatever the constructor makes of that: its own library tells
    whether there is an error, and goes on as the constructor does there."""
    try:
        inventory, recorder = build()
        assert recorder is not None
        if recorder.failed is None:
            return inventory, recorder
        failed = recorder.failed
    except RuntimeError as error:  # NotImplementedError is one
        failed = str(error)
    said = failed.strip().partition("\n")[0]
    raise NotNative(f"a constructor with a call that torch refuses: {said}", "on the meta device it may pass")
