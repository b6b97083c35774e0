"""Which classes of Transformers `weightlift.from_pretrained` takes, and how each is reached.

A model class that doesn't override ``from_pretrained`` goes straight to `load_pretrained`. Where a class overrides it,
and for the Auto classes, the override has to run first, with ``super()`` and with a class mapping that lead here: a
subclass made for the call has both. With `weightlift.install` in force none of that is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass, add_generation_mixin_to_remote_model

from weightlift.integrations.exclusive import LOADING, native_or_alone
from weightlift.integrations.room import Handle
from weightlift.integrations.transformers_model import ORIGINAL, StandIn, load_pretrained
from weightlift.integrations.transformers_options import refuse

# Transformers looks through a repository's code with `ast`, which in CPython 3.11 fails now and then (SystemError, a
# count of the recursion depth that belongs to all threads) when two threads parse at once.
_PARSING = threading.RLock()


def handles(cls: Any) -> bool:
    """True for model classes and Auto classes of Transformers."""
    return isinstance(cls, type) and issubclass(cls, (PreTrainedModel, _BaseAutoModelClass))


def installed() -> bool:
    """True while ``PreTrainedModel.from_pretrained`` leads here."""
    return PreTrainedModel.__dict__["from_pretrained"] is not ORIGINAL


def from_pretrained(cls: Any, name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``cls.from_pretrained(name, *args, **kwargs)``; see `weightlift.from_pretrained`."""
    if installed() or LOADING.writing:
        return cls.from_pretrained(name, *args, **kwargs)
    if issubclass(cls, _BaseAutoModelClass):
        found = _remote_class(cls, name, kwargs)
        if found is not None:
            return from_pretrained(found, name, args, kwargs)
        return _auto_subclass(cls).from_pretrained(name, *args, **kwargs)
    if cls.from_pretrained.__func__ is ORIGINAL.__func__:
        return load_pretrained(cls, name, args, kwargs)
    return _overriding(cls, name, args, kwargs)


# -- Auto classes -----------------------------------------------------------------------------------------------------


def _handle(cls: Any) -> Handle:
    """A model class as an Auto class sees it."""
    return Handle(cls, lambda name, *args, **kwargs: from_pretrained(cls, name, args, kwargs))


class _Handles(Mapping[Any, Any]):
    """The mapping of an Auto class, with handles for its classes."""

    def __init__(self, mapping: Any) -> None:
        self._mapping = mapping

    def __getitem__(self, key: Any) -> Any:
        found = self._mapping[key]
        return tuple(map(_handle, found)) if isinstance(found, (list, tuple)) else _handle(found)

    def __contains__(self, key: object) -> bool:
        return key in self._mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapping, name)


def _auto_subclass(cls: Any) -> Any:
    return type(cls)(
        cls.__name__, (cls,), {"_model_mapping": _Handles(cls._model_mapping), "__module__": cls.__module__}
    )


def _remote_class(cls: Any, name: Any, kwargs: dict[str, Any]) -> Any:
    """The class that a repository brings along, when the caller trusts it; None otherwise."""
    if not kwargs.get("trust_remote_code"):
        return None
    with _PARSING:
        return _parsed(cls, name, kwargs)


def _parsed(cls: Any, name: Any, kwargs: dict[str, Any]) -> Any:
    hub = {
        key: kwargs[key]
        for key in ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
        if key in kwargs
    }
    code_revision = kwargs.get("code_revision")
    config = kwargs.get("config")
    if config is None or isinstance(config, str):
        config = AutoConfig.from_pretrained(
            config or name, trust_remote_code=True, code_revision=code_revision, **hub
        )
    reference = getattr(config, "auto_map", {}).get(cls.__name__)
    local = type(config) in cls._model_mapping
    if reference is None or (local and not cls._model_mapping[type(config)].__module__.startswith("transformers.")):
        return None
    found = get_class_from_dynamic_module(reference, name, code_revision=code_revision, **hub)
    found.register_for_auto_class(auto_class=cls)
    return add_generation_mixin_to_remote_model(found)


# -- classes with a from_pretrained of their own ----------------------------------------------------------------------


class _Building(type):
    """The class of the subclasses below: called, they build the real class."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._stand_in(*args, **kwargs)  # type: ignore[attr-defined]


def _overriding(cls: Any, name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an overriding ``from_pretrained`` with a subclass, whose ``super()`` loads natively."""
    stand_in = StandIn(cls)
    body = {
        "_stand_in": stand_in,
        "get_init_context": staticmethod(stand_in.get_init_context),
        "_load_pretrained_model": staticmethod(stand_in._load_pretrained_model),
        "_finalize_model_loading": staticmethod(stand_in._finalize_model_loading),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "config_class": cls.config_class,
    }
    subclass: Any = _Building(cls.__name__, (cls,), body)

    def native() -> Any:
        refuse(name, kwargs)
        return subclass.from_pretrained(name, *args, **kwargs)

    return native_or_alone(cls, native, lambda: cls.from_pretrained(name, *args, **kwargs))
