"""Which classes of Transformers `weightlift.from_pretrained` takes, and how each is reached.

A model class that doesn't override ``from_pretrained`` goes straight to `load_pretrained`. Transformers' own overrides,
and those of its Auto classes, run in a room (`weightlift.integrations.room`) in which ``super()`` and the classes that
they look up lead here; they get the class itself, never one that stands for it. Somebody else's override may build
models by itself, so it runs as it is, alone in the process. With `weightlift.install` in force none of that is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import auto_factory
from transformers.models.auto.auto_factory import (
    _BaseAutoModelClass,
    _get_model_class,
    add_generation_mixin_to_remote_model,
)

from weightlift.integrations.exclusive import NotNative, native_or_alone
from weightlift.integrations.room import Delegate, Facade, in_room, unwrapped
from weightlift.integrations.transformers.model import ORIGINAL, load_pretrained
from weightlift.locks import LOADING, Lock

# Transformers looks through a repository's code with `ast`, which in CPython 3.11 fails now and then (SystemError, a
# count of the recursion depth that belongs to all threads) when two threads parse at once.
_PARSING = Lock(reentrant=True)


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
    found = _From(cls)
    if found.owner is PreTrainedModel:
        return load_pretrained(cls, name, args, kwargs)
    return native_or_alone(
        cls,
        lambda: found.from_pretrained(name, *args, **kwargs),
        lambda: cls.from_pretrained(name, *args, **kwargs),
    )


class _From:
    """The ``from_pretrained`` of a class, or what ``super()`` within it is: that of a class further up."""

    def __init__(self, cls: Any, after: Any = None) -> None:
        order = cls.__mro__
        above = order if after is None else order[order.index(after) + 1 :]
        self._cls = cls
        self.owner = next((item for item in above if "from_pretrained" in item.__dict__), None)

    def from_pretrained(self, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Run it with the class itself. Raises `NotNative` for code that isn't Transformers'."""
        if self.owner is PreTrainedModel:
            return load_pretrained(self._cls, pretrained_model_name_or_path, args, kwargs)
        method = None if self.owner is None else self.owner.__dict__["from_pretrained"]
        if not _of_transformers(method):
            raise NotNative("a from_pretrained of its own", "it is code that nobody here knows")
        if "get_init_context" in unwrapped(method).__code__.co_names:
            raise NotNative("a from_pretrained that sets up how the model is built", "it patches the process meanwhile")
        names = {**_LEADING_HERE, "super": lambda *_: _From(self._cls, self.owner)}
        return in_room(method, names)(self._cls, pretrained_model_name_or_path, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        raise NotNative(f"a from_pretrained that uses super().{name}", "it builds the model in a way of its own")


def _of_transformers(method: Any) -> bool:
    """True for a class method that Transformers' own code defines, whatever class it was put into."""
    function = method.__func__ if isinstance(method, classmethod) else None
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("transformers.")


# -- what Auto classes look up ----------------------------------------------------------------------------------------


def _facade(cls: Any) -> Facade:
    """A model class as an Auto class sees it."""
    return Facade(cls, lambda name, /, *args, **kwargs: from_pretrained(cls, name, args, kwargs))


def _with_mixin(model_class: Any) -> Facade:
    """A repository's class; what Transformers does to it (it is registered, may get another base) is done by then."""
    return _facade(add_generation_mixin_to_remote_model(model_class))


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that may run a repository's code, if the caller trusts it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _PARSING.own if kwargs.get("trust_remote_code") else contextlib.nullcontext():
            return function(*args, **kwargs)

    return run


def _hub() -> Any:
    """What `AutoBackbone` asks whether there is a repository; it takes other names for timm's."""
    hub: Any = auto_factory.hf_api()

    def repo_exists(*args: Any, **kwargs: Any) -> bool:
        if not hub.repo_exists(*args, **kwargs):
            raise NotNative("a backbone of timm's", "Transformers builds and loads it in a way of its own")
        return True

    return Delegate(hub, repo_exists=repo_exists)


_LEADING_HERE: Mapping[str, Any] = {
    "AutoConfig": Delegate(AutoConfig, from_pretrained=_one_at_a_time(AutoConfig.from_pretrained)),
    "_get_model_class": lambda config, mapping: _facade(_get_model_class(config, mapping)),
    "add_generation_mixin_to_remote_model": _with_mixin,
    "get_class_from_dynamic_module": _one_at_a_time(get_class_from_dynamic_module),
    "hf_api": _hub,
}
"""Names that the Auto classes' ``from_pretrained`` finds among its globals, and what they mean for a load."""
