"""What `weightlift.install` replaces in Diffusers, by the module that it is found in.

Nothing of Diffusers is imported here: programs that don't use it need not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from weightlift.integrations.diffusers.originals import original


def _model(cls: Any, *args: Any, **kwargs: Any) -> Any:
    from weightlift.integrations.diffusers.model import load_pretrained

    return load_pretrained(cls, *args, **kwargs)


def _pipeline(cls: Any, *args: Any, **kwargs: Any) -> Any:
    from weightlift.integrations.diffusers.classes import load_pipeline

    return load_pipeline(cls, *args, **kwargs)


def _auto(cls: Any, *args: Any, **kwargs: Any) -> Any:
    from weightlift.integrations.diffusers.classes import load_auto

    return load_auto(cls, *args, **kwargs)


def _single_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
    from weightlift.integrations.diffusers.classes import load_single_file

    return load_single_file(cls, *args, **kwargs)


def _method(class_name: str, method: str, ours: Callable[..., Any]) -> Callable[[ModuleType], tuple[Any, str, Any]]:
    """What puts ``ours`` in the place of a class's method, once the class's module has been run."""

    def replacement_in(module: ModuleType) -> tuple[Any, str, Any]:
        owner = getattr(module, class_name)
        theirs = original(owner, method)

        def replacement(cls: Any, *args: Any, **kwargs: Any) -> Any:
            return ours(cls, *args, **kwargs)

        replacement.__name__ = method
        replacement.__qualname__ = f"{class_name}.{method}"
        replacement.__doc__ = theirs.__func__.__doc__
        replacement.__wrapped__ = theirs.__func__  # type: ignore[attr-defined]
        replacement.replaced = theirs  # type: ignore[attr-defined]
        return owner, method, classmethod(replacement)

    return replacement_in


REPLACED: dict[str, Callable[[ModuleType], tuple[Any, str, Any]]] = {
    "diffusers.models.modeling_utils": _method("ModelMixin", "from_pretrained", _model),
    "diffusers.models.auto_model": _method("AutoModel", "from_pretrained", _auto),
    "diffusers.pipelines.pipeline_utils": _method("DiffusionPipeline", "from_pretrained", _pipeline),
    "diffusers.loaders.single_file_model": _method("FromOriginalModelMixin", "from_single_file", _single_file),
    "diffusers.loaders.single_file": _method("FromSingleFileMixin", "from_single_file", _single_file),
}
"""Module → what gives (owner, name, what takes its place) once that module has been run."""
