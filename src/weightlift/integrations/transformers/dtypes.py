"""The configurations of a load while its model is built: they keep their dtypes, but not where a sub-model is made.

``_from_config`` asks the configuration of a sub-model for its dtype and makes that the process's default, for all
threads. Nothing else that a constructor asks for may be answered differently from how Transformers would: it may build
by it, keep it, copy it. So the configurations (copies that nobody else has) and the copies that are made of them are of
a class of the load's own until the model is built, which looks who asks. The default is the recorder's instead; it
looks for the sub-model that is being made, where their dtypes differ.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from weightlift.integrations.exclusive import NotNative
from weightlift.locks import Lock

_MAKES_SUB_MODEL = inspect.unwrap(PreTrainedModel._from_config.__func__).__code__
_CLASS: Any = object.__dict__["__class__"]

_NEW = 2  # references to what nobody else has: the name, and the argument of the call that counts

_lock = Lock()
_owners: dict[int, Dtypes] = {}  # the loads that watch configurations, by the ids of these


class Dtypes:
    """Who gets to see which dtype while one model is built.

    ``refused``: of what it raised NotNative, and why, if it did. A constructor may have caught that.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._process = torch.get_default_dtype()
        self._watched: list[tuple[int, weakref.ref[Any]]] = []
        self._making: dict[int, torch.dtype | None] = {}  # the dtypes of sub-models, by their configurations
        self.refused: tuple[str, str] | None = None
        configs = list(_configs(config, set()))
        self._mixed = any(_as_dtype(_held(item)) not in (None, dtype) for item in configs)
        self._configs = configs

    @property
    def default(self) -> torch.dtype | Callable[[FrameType], torch.dtype]:
        """The default dtype of the constructor: one for all, or the dtype of the sub-model that is being made."""
        return self._of_frame if self._mixed else self._dtype

    def check(self, frame: FrameType) -> None:
        """To be called by every constructor of a model. Raises NotNative where it is that of a sub-model for which the
        process's default dtype is another now, by a configuration that is not watched. What changes nothing may pass.
        """
        self._makers(frame)

    def _of_frame(self, frame: FrameType) -> torch.dtype:
        for config in reversed(self._makers(frame)):
            dtype = self._making.get(id(config))
            if dtype is not None:
                return dtype
        return self._dtype

    def _makers(self, frame: FrameType | None) -> list[Any]:
        """The configurations of the sub-models that are being made, the outermost first."""
        makers = []
        while frame is not None:
            if frame.f_code is _MAKES_SUB_MODEL:
                self.refuse_set(frame.f_locals.get("dtype"))
                makers.append(frame.f_locals["config"])
            frame = frame.f_back
        makers.reverse()
        return makers

    def refuse_set(self, dtype: Any) -> None:
        """Raise NotNative for a sub-model that sets the process's default dtype: the constructor names one, or made its
        configuration anew. What changes nothing may pass."""
        if dtype is not None and (self._mixed or not dtype == self._dtype == self._process):
            self._refuse(f"a sub-model that its constructor makes in {dtype}", "Transformers sets it as the default")

    def _refuse(self, what: str, why: str) -> None:
        self.refused = what, why  # and not the error, which holds all frames
        raise NotNative(what, why)

    # -- watching -----------------------------------------------------------------------------------------------------

    def watch(self, config: Any) -> Any:
        """From now on ``_from_config`` is told of no dtype by this configuration. Returns it."""
        if not isinstance(config, PreTrainedConfig):
            return config
        if not _is_watched(config):
            try:
                _CLASS.__set__(config, _kind(type(config)))  # type: ignore[arg-type]
            except TypeError:  # memory of another layout: what it sets is refused
                return config
        with _lock.own:
            _owners[id(config)] = self  # within a constructor's own load: for that time it is of that
        self._watched.append((id(config), weakref.ref(config)))
        return config

    def __enter__(self) -> None:
        for config in self._configs:
            self.watch(config)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Give all configurations their own class back. Raises what was refused, also where the constructor made
        something else of that."""
        with _lock.own:
            mine = {key for key, _ in self._watched if _owners.get(key) is self}
            for key, found in self._watched:
                config: Any = found()
                if _is_watched(config) and key in mine:  # of one that is gone another may have the id
                    _CLASS.__set__(config, type(config).weightlift_base)
            for key in mine:
                del _owners[key]
        self._watched.clear()
        self._making.clear()
        if self.refused is not None and (error is None or isinstance(error, Exception)):
            raise NotNative(*self.refused)

    # -- what a watched configuration asks ----------------------------------------------------------------------------

    def shown(self, config: Any, frame: FrameType) -> Any:
        """The dtype of a configuration, for the code that asks."""
        held = _held(config)
        if frame.f_code is not _MAKES_SUB_MODEL:
            return held
        dtype = _as_dtype(held)
        if dtype is not None and not dtype.is_floating_point:
            return held  # which is refused there
        if dtype not in (None, self._dtype) and not self._mixed:
            why = "Transformers builds it under a default dtype of its own"
            self._refuse("a sub-model to whose configuration the constructor gives a dtype", why)
        self._making[id(config)] = dtype
        for name in config.sub_configs:
            self.watch(getattr(config, name, None))
        return None

    def given(self, value: Any, frame: FrameType) -> Any:
        """What a configuration's dtype is to be, where it is set: making a sub-model sets it, and those within."""
        if frame.f_code is not _MAKES_SUB_MODEL:
            return value
        self.refuse_set(value)
        return _held(frame.f_locals["config"]) if value is None else value


class _Kind(type):
    """The class of a watched configuration's class, which passes for that configuration's own."""

    weightlift_base: type

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.weightlift_base

    def __hash__(cls) -> int:
        return hash(cls.weightlift_base)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.weightlift_base(*args, **kwargs)


class _Watched:
    """A configuration whose dtype is not shown to the code that would make it the process's default."""

    weightlift_base: ClassVar[type]

    def __init_subclass__(cls) -> None:
        """Not what configurations do, which make dataclasses of the classes derived from them."""

    @property
    def dtype(self) -> Any:
        return _owners[id(self)].shown(self, _asker())

    @dtype.setter
    def dtype(self, value: Any) -> None:
        vars(self)["dtype"] = _owners[id(self)].given(value, _asker())

    @dtype.deleter
    def dtype(self) -> None:
        if "dtype" not in vars(self):
            raise AttributeError("dtype")
        del vars(self)["dtype"]

    def __getattribute__(self, name: str) -> Any:
        found = super(_Watched, self).__getattribute__(name)  # noqa: UP008 - ``__class__`` is a property below
        # A part that a property makes when it is asked for, out of the dtype among others; nobody else has it yet.
        if isinstance(found, PreTrainedConfig) and not _is_watched(found) and sys.getrefcount(found) <= _NEW:
            _owners[id(self)].watch(found)
        return found

    def __copy__(self) -> Any:
        with _plain(self):
            copied = copy.copy(self)
        return _owners[id(self)].watch(copied)

    def __deepcopy__(self, memo: Any) -> Any:
        with _plain(self):
            copied = copy.deepcopy(self, memo)
        return _owners[id(self)].watch(copied)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _plain(self):
            return self.__reduce_ex__(protocol)

    @property
    def __class__(self) -> Any:
        return type(self).weightlift_base

    @__class__.setter
    def __class__(self, value: Any) -> None:
        _CLASS.__set__(self, value)


@functools.lru_cache(maxsize=256)
def _kind(base: type) -> type:
    """The class for watched configurations of a class: one for all loads, since only the collector removes classes.
    Not for ever: a repository's code brings a class of its own each time that it is imported."""
    meta: Any = type(type(base).__name__, (_Kind, type(base)), {})
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind: type = meta(base.__name__, (_Watched, base), {**names, "weightlift_base": base})
    return kind


def _is_watched(config: Any) -> bool:
    return issubclass(type(config), _Watched)


@contextlib.contextmanager
def _plain(config: Any) -> Iterator[None]:
    """A watched configuration as one of its own class."""
    kind = type(config)
    _CLASS.__set__(config, kind.weightlift_base)
    try:
        yield
    finally:
        _CLASS.__set__(config, kind)


def _asker() -> FrameType:
    """The code that asks a configuration for its dtype, or sets it, below what configurations do to find attributes."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name.startswith("__") and "attr" in frame.f_code.co_name:
        frame = frame.f_back
    return frame


def _held(config: Any) -> Any:
    """The dtype that a configuration has."""
    values = vars(config)
    if "dtype" in values:
        return values["dtype"]
    base = getattr(type(config), "weightlift_base", type(config))
    found = inspect.getattr_static(base, "dtype", None)
    return found.__get__(config, base) if isinstance(found, property) else found


def _as_dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
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
