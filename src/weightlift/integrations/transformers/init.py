"""Building a Transformers model, and initialising what its checkpoint lacks, without what its own loading patches.

- The constructors end with ``init_weights``, which replaces functions of ``torch.nn.init`` while it runs, unless the
  thread builds on the meta device. It asks so through ``torch.tensor([]).device``; the recorder answers that call.
- Sub-models made from a configuration set the process's default dtype to the configuration's, if that has one. They
  are told of none (`weightlift.integrations.transformers.dtypes`); the default is the recorder's instead.
- Initialisation comes later, as recorded calls of each class's own ``_init_weights``, so that only what the checkpoint
  lacks is ever computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils
from transformers.modeling_utils import PreTrainedModel

from weightlift.deferred.construct import CurrentLoad
from weightlift.integrations.constructors import Built, built
from weightlift.integrations.transformers.dtypes import Dtypes

_ASKS_FOR_META = modeling_utils.get_torch_context_manager_or_global_device.__code__


def build(
    cls: Any, make: Callable[[], Any], config: Any, dtype: torch.dtype, load: CurrentLoad
) -> Built:
    """Run the constructor of a class deferred. ``config`` is the load's own copy, ``dtype`` the default dtype."""
    dtypes = Dtypes(config, dtype)

    def answer(frame: FrameType, args: Any, kwargs: Any) -> Any:
        """Every constructor of a model comes to that question, so this is where to see what it was made from."""
        answer = _meta_if_asked(frame, args, kwargs)
        if answer is not NotImplemented:
            dtypes.check(frame)
        return answer

    with dtypes:
        return built(cls, make, load, default_dtype=dtypes.default, answers={torch.tensor: answer})


def _meta_if_asked(frame: FrameType, args: Any, kwargs: Any) -> Any:
    """``torch.tensor([])`` in the function that finds out whether this thread builds on meta."""
    return torch.empty(0, device="meta") if frame.f_code is _ASKS_FOR_META else NotImplemented


ANSWERS = {torch.tensor: _meta_if_asked}
"""What the recorder answers while constructors of Transformers run within models of other libraries."""


def mark(built: Built) -> None:
    """Mark the modules of Transformers' models as their constructors do, unless told that they build on meta: unmarked
    ones are initialised by whichever model they are put into later, whatever values they have by then."""
    if any(issubclass(cls, PreTrainedModel) for cls in built.classes):
        for part in built.model.modules():
            if isinstance(part, PreTrainedModel):
                for module in part.modules():
                    module.__dict__["_is_hf_initialized"] = True


def tie(model: Any) -> None:
    """Make sure that the names which the model calls tied share one tensor.

    Its constructor ties them, unless another thread's load has ``tie_weights`` replaced at that moment.
    """
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        tensor = model.get_parameter_or_buffer(source)
        owner, _, name = target.rpartition(".")
        module = model.get_submodule(owner)
        if getattr(module, name) is tensor:
            continue
        if name in module._parameters and isinstance(tensor, nn.Parameter):
            module._parameters[name] = tensor  # past ``register_parameter``, which accelerate replaces for all threads
        else:
            setattr(module, name, tensor)


def initialise(model: Any, supplied: Mapping[int, torch.Tensor]) -> None:
    """Call ``_init_weights``, as ``initialize_weights`` does, without the functions that replaces, for every module
    within which something has no value yet: a tensor that the checkpoint lacks, or a buffer that none has.

    ``supplied`` are the tensors, by their ids, that have their values from elsewhere: they are marked, as Transformers
    marks what it has loaded. To be run while the model's recorder is on.
    """
    for tensor in supplied.values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    with _tied_targets_aside(model):
        _visit(model, model._initialize_weights, model.is_custom_code(), supplied)


def _visit(
    module: nn.Module, initialize: Callable[[nn.Module, bool], None], is_custom_code: bool, supplied: Container[int]
) -> bool:
    """Children first. Returns whether all there is within ``module`` was supplied, and nothing had to be done."""
    complete = True
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            complete = complete and (tensor is None or id(tensor) in supplied)
    for child in dict.fromkeys(module._modules.values()):
        if child is not None:
            inner = child._initialize_weights if isinstance(child, PreTrainedModel) else initialize
            complete = _visit(child, inner, is_custom_code, supplied) and complete
    if complete:
        module.__dict__["_is_hf_initialized"] = True  # as the call would have left it
    else:
        initialize(module, is_custom_code)
    return complete


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
