"""What `weightlift.install` replaces in Diffusers: at once where it is imported, else when it comes to be imported.

Nothing of Diffusers is imported here: programs that don't use it need not wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Replace = Callable[[Any, str, Any], None]


def _model(cls: Any, *args: Any, **kwargs: Any) -> Any:
    from weightlift.integrations.diffusers_model import load_pretrained

    return load_pretrained(cls, *args, **kwargs)


def _pipeline(cls: Any, *args: Any, **kwargs: Any) -> Any:
    from weightlift.integrations.diffusers_classes import load_pipeline

    return load_pipeline(cls, *args, **kwargs)


def _auto(cls: Any, *args: Any, **kwargs: Any) -> Any:
    from weightlift.integrations.diffusers_classes import load_auto

    return load_auto(cls, *args, **kwargs)


def _single_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
    from weightlift.integrations.diffusers_classes import load_single_file

    return load_single_file(cls, *args, **kwargs)


_REPLACED: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "diffusers.models.modeling_utils": ("ModelMixin", "from_pretrained", _model),
    "diffusers.models.auto_model": ("AutoModel", "from_pretrained", _auto),
    "diffusers.pipelines.pipeline_utils": ("DiffusionPipeline", "from_pretrained", _pipeline),
    "diffusers.loaders.single_file_model": ("FromOriginalModelMixin", "from_single_file", _single_file),
    "diffusers.loaders.single_file": ("FromSingleFileMixin", "from_single_file", _single_file),
}


def replace_methods(replace: Replace) -> Finder:
    """Replace what is imported; the finder that is returned does the rest, while it is in ``sys.meta_path``."""
    finder = Finder(replace)
    sys.meta_path.insert(0, finder)
    for name in _REPLACED:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            finder.replace_in(module)
    return finder


class Finder:
    """Finds nothing itself: it sees to it that modules of Diffusers are attended to once they have been run."""

    def __init__(self, replace: Replace) -> None:
        self._replace = replace

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that replaces the methods after loading."""
        if name not in _REPLACED:
            return None
        for finder in sys.meta_path:
            look = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if finder is self or look is None else look(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def replace_in(self, module: ModuleType) -> None:
        """Put our methods in the place of a module's."""
        class_name, method, ours = _REPLACED[module.__name__]
        owner = getattr(module, class_name)
        theirs = owner.__dict__[method]

        def replacement(cls: Any, *args: Any, **kwargs: Any) -> Any:
            return ours(cls, *args, **kwargs)

        replacement.__name__ = method
        replacement.__qualname__ = f"{class_name}.{method}"
        replacement.__doc__ = theirs.__func__.__doc__
        replacement.__wrapped__ = theirs.__func__  # type: ignore[attr-defined]
        replacement.replaced = theirs  # type: ignore[attr-defined]
        self._replace(owner, method, classmethod(replacement))


class _Loader:
    """A loader that tells a finder when its module has been run."""

    def __init__(self, loader: Any, finder: Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then replace the methods, unless the drop-in has been taken out meanwhile."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            self._finder.replace_in(module)
