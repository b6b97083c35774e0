"""What of a model class's loading is not called here, and the classes for which that would make a difference.

Transformers' own versions of these are replaced by a plan, by the recorder and by ties that are one tensor from the
start. A class of somebody else's that overrides one of them means something by it, so its loads are not native. What
else a class may override (``_init_weights``, ``post_init``, ``_adjust_missing_and_unexpected_keys``, …) is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from weightlift.integrations.exclusive import NotNative
from weightlift.integrations.not_native import override_of

LOADING_HOOKS = (
    "get_init_context",
    "_load_pretrained_model",
    "_finalize_model_loading",
    "mark_tied_weights_as_initialized",
    "_move_missing_keys_from_meta_to_device",
    "_initialize_missing_keys",
    "initialize_weights",
    "smart_apply",
    "tie_weights",
    "state_dict",
    "named_buffers",
    "named_non_persistent_buffers",
)
"""What is asked of the class that is loaded, by code that does not run here."""

PART_HOOKS = ("_initialize_weights",)
"""What is asked of the models within it as well; here only where something in them is missing."""

_KNOWN = ("transformers", "torch")


def refuse_hooks(cls: Any) -> None:
    """Raise `NotNative` for a model class that overrides something that is not called here."""
    _refuse([cls], (*LOADING_HOOKS, *PART_HOOKS))


def refuse_parts(classes: Iterable[type]) -> None:
    """`refuse_hooks` for the models within a model, by the classes of its modules."""
    _refuse([cls for cls in classes if issubclass(cls, PreTrainedModel)], PART_HOOKS)


def _refuse(classes: Iterable[Any], hooks: tuple[str, ...]) -> None:
    for cls in classes:
        if (found := override_of(cls, hooks, _KNOWN)) is not None:
            raise NotNative(found, "Transformers' loading calls it, this one would not")
