"""What `weightlift.install` replaces in Transformers, by the module that it is found in.

Nothing of Transformers is imported here: whoever needs it does that, after setting what it reads when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any


def _model_class(module: ModuleType) -> tuple[Any, str, Any]:
    # Now, in the thread that imports Transformers, and not when several threads make their first loads.
    from weightlift.integrations.transformers.model import ORIGINAL, load_pretrained

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        return load_pretrained(cls, pretrained_model_name_or_path, model_args, kwargs)

    from_pretrained.__qualname__ = ORIGINAL.__func__.__qualname__
    from_pretrained.__doc__ = ORIGINAL.__func__.__doc__
    from_pretrained.__wrapped__ = ORIGINAL.__func__  # type: ignore[attr-defined]
    return module.PreTrainedModel, "from_pretrained", classmethod(from_pretrained)


def _collector(module: ModuleType) -> tuple[Any, str, Any]:
    from weightlift.integrations.transformers.collector import SafeCollector

    theirs = module._active_collector
    return module, "_active_collector", SafeCollector(getattr(theirs, "replaced", theirs))


REPLACED: dict[str, Callable[[ModuleType], tuple[Any, str, Any]]] = {
    "transformers.modeling_utils": _model_class,
    "transformers.utils.output_capturing": _collector,
}
"""Module → what gives (owner, name, what takes its place) once that module has been run."""
