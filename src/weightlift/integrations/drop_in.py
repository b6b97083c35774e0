"""The drop-in: programs that call ``from_pretrained`` somewhere deep inside load through weightlift, unchanged.

`install` is the one place where attributes of another library are replaced, because the user asks for it. It replaces
``transformers.PreTrainedModel.from_pretrained`` (model classes inherit it, Auto classes call it), the collector behind
Transformers' own ``output_hidden_states=True``, which mixes up threads while anything compiles, and the methods of
Diffusers that `weightlift.integrations.diffusers.install` names; nothing else.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from weightlift.integrations.diffusers import install as diffusers_install
from weightlift.integrations.transformers import install as transformers_install
from weightlift.integrations.upon_import import Finder, imported
from weightlift.locks import Lock

_REPLACED = {**transformers_install.REPLACED, **diffusers_install.REPLACED}

_lock = Lock()
_undo: list[tuple[Any, str, Any]] = []
_finders: list[Finder] = []
_attended: set[str] = set()


def install() -> None:
    """From now on ``from_pretrained`` of Transformers' models, and of Diffusers' models and pipelines, goes through
    weightlift. Imports nothing: each library is attended to when the program imports it, or at once if it did.

    For the whole process and all threads; calling it again changes nothing. Loads that are running go on as they began.
    """
    # What gives a replacement may import: the lock, for which an import may be waiting, is not held meanwhile.
    ready = [(module.__name__, _REPLACED[module.__name__](module)) for module in imported(_REPLACED)]
    with _lock.own:
        if _finders:
            return
        finder = Finder(_REPLACED, _attend)
        sys.meta_path.insert(0, finder)
        _finders.append(finder)
        for name, replacement in ready:
            _replace(name, replacement)
    for module in imported(_REPLACED.keys() - _attended):  # whose import had begun before the finder was in its place
        _attend(finder, module)


def uninstall() -> None:
    """Put the very objects back that `install` replaced. Without `install` it does nothing."""
    with _lock.own:
        while _finders:
            sys.meta_path.remove(_finders.pop())
        while _undo:
            owner, name, was = _undo.pop()
            setattr(owner, name, was)
        _attended.clear()


def _attend(finder: Finder, module: ModuleType) -> None:
    """Replace what is in a module, unless the drop-in has been taken out meanwhile."""
    if finder in _finders:
        replacement = _REPLACED[module.__name__](module)
        with _lock.own:
            if finder in _finders:
                _replace(module.__name__, replacement)


def _replace(module: str, replacement: tuple[Any, str, Any]) -> None:
    owner, name, new = replacement
    _undo.append((owner, name, owner.__dict__[name]))
    setattr(owner, name, new)
    _attended.add(module)
