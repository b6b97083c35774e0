"""Loading models of other libraries by their own calling conventions; none is imported before it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from weightlift.integrations.drop_in import install, uninstall
from weightlift.locks import LOADING

__all__ = ["from_pretrained", "from_single_file", "install", "uninstall"]

_FIRST = (
    "pretrained_model_name_or_path",
    "pretrained_model_or_path",
    "pretrained_model_link_or_path_or_dict",
    "pretrained_model_link_or_path",
)


class _Missing:
    """No first argument was given; None is one."""

    def __repr__(self) -> str:
        return "…"


_MISSING: Any = _Missing()


def from_pretrained(cls: Any, name: Any = _MISSING, /, *args: Any, **kwargs: Any) -> Any:
    """``cls.from_pretrained(name, *args, **kwargs)``: the same model, from any number of threads at once.

    ``cls`` is a model class of Transformers (``LlamaForCausalLM``) or of Diffusers (``UNet2DConditionModel``), a
    pipeline class (``DiffusionPipeline``), or an Auto class of either; everything else is as it takes it: ``dtype``,
    ``device_map``, ``config``, ``output_loading_info``, ``variant`` and the rest; so is the name of ``name`` itself. A
    pipeline also takes ``dduf_file``.
    What is not loaded natively is loaded by the library's own code, alone in the process (docs/transformers.md and
    docs/diffusers.md have the lists).

    Raises what the library raises for arguments that it refuses; `PlanError` (a RuntimeError) before anything is read
    when shapes differ; `CheckpointError` for files that break their format; TypeError for another class.

    Thread-safe: no state of the process is written, unless the load is one of those that are not native; then it waits
    for the loads that run, and others wait for it.
    """
    name = _first(name, kwargs)
    load = None
    if "transformers" in sys.modules:
        from weightlift.integrations.transformers import classes as transformers_classes

        if transformers_classes.handles(cls):
            load = transformers_classes.from_pretrained
    if load is None and "diffusers" in sys.modules:
        from weightlift.integrations.diffusers import classes as diffusers_classes

        if diffusers_classes.handles(cls):
            load = diffusers_classes.from_pretrained
    if load is not None:
        return _alone(cls.from_pretrained, kwargs) if name is _MISSING else load(cls, name, args, kwargs)
    raise TypeError(f"expected a model, pipeline or Auto class of Transformers or Diffusers, {_found(cls)}")


def from_single_file(cls: Any, file: Any = _MISSING, /, **kwargs: Any) -> Any:
    """``cls.from_single_file(file, **kwargs)`` of a Diffusers model or pipeline class: the same, from any number of
    threads at once.

    ``file`` is a path or a link to a checkpoint in its publisher's layout, or for a model a state dict, which stays as
    it is; it may be given by the name that it has there. The rest is as Diffusers takes it: ``config``,
    ``original_config``, ``subfolder``, ``torch_dtype``. What the class's conversion makes of the tensors is planned
    from the file's header; each byte then goes to its place.

    Raises what Diffusers raises; `PlanError` before anything is read when shapes differ or weights are missing, which
    Diffusers would leave on ``meta``; `CheckpointError` for files that break their format; TypeError for another class.
    Thread-safe as `from_pretrained` is.
    """
    file = _first(file, kwargs)
    if "diffusers" in sys.modules:
        from weightlift.integrations.diffusers import classes as diffusers_classes

        if diffusers_classes.handles(cls):
            if file is _MISSING and hasattr(cls, "from_single_file"):
                return _alone(cls.from_single_file, kwargs)
            return diffusers_classes.from_single_file(cls, file, kwargs)
    raise TypeError(f"expected a model or pipeline class of Diffusers, {_found(cls)}")


def _found(cls: Any) -> str:
    """A class or a text as it is; a model would print all of its layers."""
    return f"found {cls!r}" if isinstance(cls, type | str) else f"found an object of class {type(cls).__name__}"


def _first(given: Any, kwargs: dict[str, Any]) -> Any:
    """The first argument of theirs, taken out of ``kwargs`` where it is given by the name that it has there."""
    names = [name for name in _FIRST if name in kwargs]
    return kwargs.pop(names[0]) if given is _MISSING and names else given


def _alone(method: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """A call without the first argument, which nearly every method refuses in the words of its library."""
    with LOADING.alone():
        return method(**kwargs)
