"""Loading models of other libraries by their own calling conventions; none is imported before it is used."""

from __future__ import annotations

import sys
from typing import Any

from weightlift.integrations.drop_in import install, uninstall

__all__ = ["from_pretrained", "install", "uninstall"]


def from_pretrained(cls: Any, name: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``cls.from_pretrained(name, *args, **kwargs)``: the same model, from any number of threads at once.

    ``cls`` is a model class of Transformers (``LlamaForCausalLM``) or of Diffusers (``UNet2DConditionModel``), a
    pipeline class (``DiffusionPipeline``), or an Auto class of either; everything else is as it takes it: ``dtype``,
    ``device_map``, ``config``, ``output_loading_info``, ``variant`` and the rest. A pipeline also takes ``dduf_file``.
    What is not loaded natively is loaded by the library's own code, alone in the process (docs/transformers.md and
    docs/diffusers.md have the lists).

    Raises what the library raises for arguments that it refuses; `PlanError` (a RuntimeError) before anything is read
    when shapes differ; `CheckpointError` for files that break their format; TypeError for another class.

    Thread-safe: no state of the process is written, unless the load is one of those that are not native; then it waits
    for the loads that run, and others wait for it.
    """
    if "transformers" in sys.modules:
        from weightlift.integrations import transformers_classes

        if transformers_classes.handles(cls):
            return transformers_classes.from_pretrained(cls, name, args, kwargs)
    if "diffusers" in sys.modules:
        from weightlift.integrations import diffusers_classes

        if diffusers_classes.handles(cls):
            return diffusers_classes.from_pretrained(cls, name, args, kwargs)
    raise TypeError(f"expected a model, pipeline or Auto class of Transformers or Diffusers, found {cls!r}")
