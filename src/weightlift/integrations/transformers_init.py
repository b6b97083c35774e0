"""Building a Transformers model, and initialising what its checkpoint lacks, without what its own loading patches.

- The constructors end with ``init_weights``, which replaces functions of ``torch.nn.init`` while it runs, unless the
  thread builds on the meta device. It asks so through ``torch.tensor([]).device``; the recorder answers that call.
- Sub-models made from a configuration set the process's default dtype to the configuration's, if that has one. The
  configurations of the load (copies that nobody else has) have none while the constructor runs; the default is the
  recorder's instead.
- Initialisation comes later, as recorded calls of each class's own ``_init_weights``, so that only what the checkpoint
  lacks is ever computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from weightlift.deferred.construct import CurrentLoad, construct
from weightlift.deferred.inventory import Inventory
from weightlift.deferred.recorder import Recorder
from weightlift.integrations.transformers_options import NotNative

_ASKS_FOR_META = modeling_utils.get_torch_context_manager_or_global_device.__code__


def build(make: Callable[[], Any], config: Any, dtype: torch.dtype, load: CurrentLoad) -> tuple[Any, Recorder]:
    """Run a constructor deferred. ``config`` is the load's own copy, ``dtype`` the default dtype for it."""
    restore = _without_dtypes(config)
    model, recorder = construct(make, load, default_dtype=dtype, answers=ANSWERS)
    assert recorder is not None
    restore(model, dtype)
    return model, recorder


def _meta_if_asked(frame: FrameType, args: Any, kwargs: Any) -> Any:
    """``torch.tensor([])`` in the function that finds out whether this thread builds on meta."""
    if frame.f_code is _ASKS_FOR_META:
        return torch.empty(0, device="meta")
    return NotImplemented


ANSWERS = {torch.tensor: _meta_if_asked}
"""What the recorder answers while constructors of Transformers run, also those within models of other libraries."""


def _without_dtypes(config: Any) -> Callable[[nn.Module, torch.dtype], None]:
    """Take the dtypes out of a configuration; what is returned puts them back once the model is there.

    A constructor that fails needs no such care: nobody else has the configuration.
    """
    known = [item for item in _configs(config, set()) if "dtype" in item.__dict__]
    found = {id(item): (item, item.__dict__.pop("dtype")) for item in known}

    def restore(model: nn.Module, dtype: torch.dtype) -> None:
        # Making a sub-model from a configuration sets its dtype and those of its parts: to None now, which tells them.
        used = {key for key, (item, _) in found.items() if "dtype" in item.__dict__}
        for item, value in found.values():
            item.__dict__["dtype"] = value
        for key, (item, _) in found.items():
            parts = [getattr(item, name, None) for name in item.sub_configs] if key in used else []
            for inner in parts:
                if id(inner) in used and inner is not None:
                    inner.__dict__["dtype"] = item.__dict__["dtype"]
        others = {str(found[key][0].__dict__["dtype"]) for key in used} - {"None", str(dtype), str(dtype)[6:]}
        if others:
            why = "Transformers builds it under a default dtype of its own"
            raise NotNative(f"a sub-model in {', '.join(others)}", why)
        for module in model.modules():
            for item in _configs(getattr(module, "config", None), set()):
                if id(item) not in found and item.__dict__.get("dtype") is None:
                    item.__dict__["dtype"] = dtype  # a copy that the constructor made

    return restore


def _configs(value: Any, seen: set[int]) -> Iterator[Any]:
    """A configuration and those within it."""
    if id(value) in seen:
        return
    if isinstance(value, PreTrainedConfig):
        seen.add(id(value))
        yield value
        for item in list(value.__dict__.values()):
            yield from _configs(item, seen)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _configs(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _configs(item, seen)


def tie(model: Any) -> None:
    """Make sure that the names which the model calls tied share one tensor.

    Its constructor ties them, unless another thread's load has ``tie_weights`` replaced at that moment.
    """
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        tensor = model.get_parameter_or_buffer(source)
        owner, _, name = target.rpartition(".")
        module = model.get_submodule(owner)
        if getattr(module, name) is not tensor:
            setattr(module, name, tensor)


def initialise(model: Any, supplied: set[int]) -> None:
    """Call ``_init_weights`` for every module, as ``initialize_weights`` does, without the functions that replaces.

    ``supplied`` are the ids of the tensors that have their values from elsewhere: they are marked, as Transformers
    marks what it has loaded. To be run while the model's recorder is on.
    """
    for slot in Inventory.of(model).slots:
        if id(slot.tensor) in supplied:
            slot.tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    with _tied_targets_aside(model):
        _visit(model, model._initialize_weights, model.is_custom_code())


def _visit(module: nn.Module, initialize: Callable[[nn.Module, bool], None], is_custom_code: bool) -> None:
    for child in module.children():
        inner = child._initialize_weights if isinstance(child, PreTrainedModel) else initialize
        _visit(child, inner, is_custom_code)
    initialize(module, is_custom_code)


@contextlib.contextmanager
def _tied_targets_aside(model: Any) -> Iterator[None]:
    """A tied value that the checkpoint lacks under all its names is initialised as its source is, not as the module
    that ties to it would."""
    held = []
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        tensor = model.get_parameter_or_buffer(source)
        owner, _, name = target.rpartition(".")
        slots = model.get_submodule(owner)._parameters
        if slots.get(name) is tensor and not getattr(tensor, "_is_hf_initialized", False):
            stand_in = nn.Parameter(torch.empty_like(tensor), requires_grad=False)
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
            held.append((slots, name, tensor))
            slots[name] = stand_in
    try:
        yield
    finally:
        for slots, name, tensor in held:
            slots[name] = tensor
