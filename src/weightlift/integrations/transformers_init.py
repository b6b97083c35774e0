"""Building a Transformers model, and initialising what its checkpoint lacks, without what its own loading patches.

- The constructors end with ``init_weights``, which replaces functions of ``torch.nn.init`` while it runs, unless the
  thread builds on the meta device. It asks so through ``torch.tensor([]).device``; the recorder answers that call.
- Sub-models made from a configuration set the process's default dtype to the configuration's, if that has one. The
  configurations of the load (copies that nobody else has) have none while the constructor runs; the default is the
  recorder's instead, which looks for the sub-model that is being made where their dtypes differ.
- Initialisation comes later, as recorded calls of each class's own ``_init_weights``, so that only what the checkpoint
  lacks is ever computed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from weightlift.deferred.construct import CurrentLoad, construct
from weightlift.deferred.inventory import modules_of, tensors_of
from weightlift.deferred.recorder import Recorder
from weightlift.integrations.exclusive import NotNative

_ASKS_FOR_META = modeling_utils.get_torch_context_manager_or_global_device.__code__
_MAKES_SUB_MODEL = inspect.unwrap(PreTrainedModel._from_config.__func__).__code__


def build(make: Callable[[], Any], config: Any, dtype: torch.dtype, load: CurrentLoad) -> tuple[Any, Recorder]:
    """Run a constructor deferred. ``config`` is the load's own copy, ``dtype`` the default dtype for it."""
    dtypes = _Dtypes(config, dtype)
    model, recorder = construct(make, load, default_dtype=dtypes.default, answers={torch.tensor: dtypes.answer})
    assert recorder is not None
    dtypes.restore(model)
    return model, recorder


def _meta_if_asked(frame: FrameType, args: Any, kwargs: Any) -> Any:
    """``torch.tensor([])`` in the function that finds out whether this thread builds on meta."""
    return torch.empty(0, device="meta") if frame.f_code is _ASKS_FOR_META else NotImplemented


ANSWERS = {torch.tensor: _meta_if_asked}
"""What the recorder answers while constructors of Transformers run within models of other libraries."""


class _Dtypes:
    """The dtypes of a configuration, which are taken out of it while its model is built, and put back afterwards.

    A constructor that fails needs no such care: nobody else has the configuration.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        known = [item for item in _configs(config, set()) if "dtype" in item.__dict__]
        self._dtype = dtype
        self._process = torch.get_default_dtype()
        self._known = {id(item): item for item in known}
        self._kinds = tuple({type(item) for item in known})
        self._dtypes = {id(item): item.__dict__.pop("dtype") for item in known}
        self._made: list[Any] = []  # the configurations that sub-models were made from, in that order
        self._mixed = any(_as_dtype(value) not in (None, dtype) for value in self._dtypes.values())

    @property
    def default(self) -> torch.dtype | Callable[[FrameType], torch.dtype]:
        """The default dtype of the constructor: one for all, or the dtype of the sub-model that is being made."""
        return self._of_frame if self._mixed else self._dtype

    def answer(self, frame: FrameType, args: Any, kwargs: Any) -> Any:
        """``torch.tensor([])`` in the function that finds out whether this thread builds on meta: it does.

        Every constructor of a model comes to that question, so this is where to see what it was made from.
        """
        answer = _meta_if_asked(frame, args, kwargs)
        if answer is not NotImplemented:
            self._makers(frame)
        return answer

    def _of_frame(self, frame: FrameType) -> torch.dtype:
        for config in reversed(self._makers(frame)):
            dtype = _as_dtype(self._dtypes.get(id(config)))
            if dtype is not None:
                return dtype
        return self._dtype

    def _makers(self, frame: FrameType | None) -> list[Any]:
        """The configurations of the sub-models that are being made, the outermost first."""
        makers = []
        while frame is not None:
            if frame.f_code is _MAKES_SUB_MODEL:
                self._refuse_set(frame.f_locals.get("dtype"))
                makers.append(frame.f_locals["config"])
            frame = frame.f_back
        makers.reverse()
        for config in makers:
            if all(config is not other for other in self._made):
                self._made.append(config)
                self._pass_on(config)
        return makers

    def _refuse_set(self, dtype: torch.dtype | None) -> None:
        """Raise NotNative for a sub-model that sets the process's default dtype, though its configuration has none: the
        constructor names one. What changes nothing may pass."""
        if dtype is not None and (self._mixed or not dtype == self._dtype == self._process):
            raise NotNative(f"a sub-model that its constructor makes in {dtype}", "Transformers sets it as the default")

    def _pass_on(self, config: Any) -> None:
        """Making a sub-model from a configuration gives the configuration's dtype to its parts."""
        own = self._dtypes.get(id(config), config.__dict__.get("dtype"))
        if id(config) not in self._known:
            if self._mixed or _as_dtype(own) not in (None, self._dtype):
                why = "Transformers may build it under a default dtype of its own"
                raise NotNative("a sub-model of a configuration that its constructor made", why)
            if not self._is_new(config):
                return
        for name in config.sub_configs:
            part = getattr(config, name, None)
            if id(part) in self._known:
                self._dtypes[id(part)] = own

    def restore(self, model: nn.Module) -> None:
        """Give every configuration the dtype that Transformers would have left it with."""
        for key, item in self._known.items():
            item.__dict__["dtype"] = self._dtypes[key]
        seen: set[int] = set()
        for module in modules_of(model):
            if "config" not in module.__dict__ and not hasattr(type(module), "config"):
                continue  # asking nn.Module for what it has not got takes longer than all else here
            for item in _configs(getattr(module, "config", None), seen):
                if id(item) not in self._known and not self._is_new(item) and item.__dict__.get("dtype") is None:
                    item.__dict__["dtype"] = self._dtype  # a copy that the constructor made

    def _is_new(self, config: Any) -> bool:
        """Whether the constructor made a configuration of nothing, rather than copied one of the load's (as its class,
        or as one derived from that). It has the dtype it shall have, most often None, and passes it on to its parts."""
        return id(config) not in self._known and not isinstance(config, self._kinds)


def _as_dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value.removeprefix("torch.")) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) else None


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
        if getattr(module, name) is tensor:
            continue
        if name in module._parameters and isinstance(tensor, nn.Parameter):
            module._parameters[name] = tensor  # past ``register_parameter``, which accelerate replaces for all threads
        else:
            setattr(module, name, tensor)


def initialise(model: Any, supplied: set[int]) -> None:
    """Call ``_init_weights``, as ``initialize_weights`` does, without the functions that replaces, for every module
    within which something has no value yet: a tensor that the checkpoint lacks, or a buffer that none has.

    ``supplied`` are the ids of the tensors that have their values from elsewhere: they are marked, as Transformers
    marks what it has loaded. To be run while the model's recorder is on.
    """
    for _, tensor in tensors_of(model):
        if id(tensor) in supplied:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    with _tied_targets_aside(model):
        _visit(model, model._initialize_weights, model.is_custom_code(), supplied)


def _visit(
    module: nn.Module, initialize: Callable[[nn.Module, bool], None], is_custom_code: bool, supplied: set[int]
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
