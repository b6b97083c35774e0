"""The drop-in: programs that call ``from_pretrained`` somewhere deep inside load through weightlift, unchanged.

`install` is the one place where attributes of another library are replaced, because the user asks for it. It replaces
``transformers.PreTrainedModel.from_pretrained`` (model classes inherit it, Auto classes call it), the collector behind
Transformers' own ``output_hidden_states=True``, which mixes up threads while anything compiles, and the methods of
Diffusers that `weightlift.integrations.diffusers_install` names; nothing else.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from weightlift.integrations.diffusers_install import Finder, replace_methods

_lock = threading.Lock()
_undo: list[tuple[Any, str, Any]] = []
_finders: list[Finder] = []


def install() -> None:
    """From now on ``from_pretrained`` of Transformers' models, and of Diffusers' models and pipelines, goes through
    weightlift. Imports Transformers; Diffusers is attended to when the program imports it.

    For the whole process and all threads; calling it again changes nothing. Loads that are running go on as they began.
    """
    from weightlift.integrations.transformers_model import ORIGINAL, load_pretrained

    with _lock:
        if _undo:
            return

        def from_pretrained(
            cls: Any, pretrained_model_name_or_path: Any = None, *model_args: Any, **kwargs: Any
        ) -> Any:
            return load_pretrained(cls, pretrained_model_name_or_path, model_args, kwargs)

        from_pretrained.__doc__ = ORIGINAL.__func__.__doc__
        from_pretrained.__wrapped__ = ORIGINAL.__func__  # type: ignore[attr-defined]
        _replace(_model_class(), "from_pretrained", classmethod(from_pretrained))
        _replace_collector()
        _finders.append(replace_methods(_replace))


def uninstall() -> None:
    """Put the very objects back that `install` replaced. Without `install` it does nothing."""
    with _lock:
        while _finders:
            sys.meta_path.remove(_finders.pop())
        while _undo:
            owner, name, was = _undo.pop()
            setattr(owner, name, was)


def _replace_collector() -> None:
    from transformers.utils import output_capturing

    from weightlift.integrations.transformers_capture import SafeCollector

    _replace(output_capturing, "_active_collector", SafeCollector(output_capturing._active_collector))


def _model_class() -> Any:
    from transformers.modeling_utils import PreTrainedModel

    return PreTrainedModel


def _replace(owner: Any, name: str, new: Any) -> None:
    _undo.append((owner, name, owner.__dict__[name]))
    setattr(owner, name, new)
