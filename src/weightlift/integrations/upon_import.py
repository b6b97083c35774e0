"""Attending to modules of other libraries at the moment when somebody imports them, and not before."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Finder:
    """Finds nothing itself: while it is in ``sys.meta_path`` it sees to it that modules of the given names are shown to
    ``attend``, each when it has been run and before anybody else can have it.
    """

    def __init__(self, names: Collection[str], attend: Callable[[Finder, ModuleType], None]) -> None:
        self._names = names
        self.attend = attend

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that tells when the module has been run."""
        if name not in self._names:
            return None
        for finder in sys.meta_path:
            look = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if finder is self or look is None else look(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """A loader that shows its module to a finder's ``attend`` once it has been run."""

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
        """Run the module, under its own loader's name."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.attend(self._finder, module)


def imported(names: Collection[str]) -> Iterator[ModuleType]:
    """Those modules that are imported already. What another thread is importing is waited for.

    Raises RuntimeError for a module that the calling thread itself is in the midst of importing.
    """
    for name in names:
        module = sys.modules.get(name)
        if module is not None and _unfinished(module):
            try:
                module = importlib.import_module(name)
            except Exception:
                continue  # its import failed, and whoever began it is told
            if _unfinished(module):
                raise RuntimeError(f"{name} is being imported by this very thread: call it before, or afterwards")
        if module is not None:
            yield module


def _unfinished(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))
