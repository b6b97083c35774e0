"""Which classes of Diffusers `weightlift.from_pretrained` takes, and how each is reached.

A model class that doesn't override ``from_pretrained`` goes straight to `load_pretrained`, a pipeline class to
`load_pipeline`. Where a class overrides it, and for the Auto classes, the override runs in a room in which ``super()``
and the classes that it looks up lead here; somebody else's override runs alone in the process. With
`weightlift.install` in force only the Auto class needs that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

from diffusers import AutoModel, DiffusionPipeline
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.models.modeling_utils import LegacyModelMixin, ModelMixin
from diffusers.pipelines import auto_pipeline
from diffusers.pipelines.pipeline_loading_utils import get_class_obj_and_candidates
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

from weightlift.integrations.diffusers import dduf, pipeline, single_file, single_pipeline
from weightlift.integrations.diffusers.model import ORIGINAL, load_pretrained
from weightlift.integrations.diffusers.originals import original
from weightlift.integrations.exclusive import NotNative, native_or_alone
from weightlift.integrations.room import Facade, in_room, unwrapped
from weightlift.locks import LOADING

AUTO_ORIGINAL: Any = original(AutoModel, "from_pretrained")
_AUTO_PIPELINES = tuple(
    value for name, value in vars(auto_pipeline).items() if isinstance(value, type) and name.startswith("AutoPipeline")
)


def handles(cls: Any) -> bool:
    """True for model and pipeline classes of Diffusers, and for its Auto classes."""
    return isinstance(cls, type) and issubclass(cls, (ModelMixin, DiffusionPipeline, AutoModel, *_AUTO_PIPELINES))


def installed() -> bool:
    """True while ``ModelMixin.from_pretrained`` leads here."""
    return ModelMixin.__dict__["from_pretrained"] is not ORIGINAL


def from_pretrained(cls: Any, name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``cls.from_pretrained(name, *args, **kwargs)``; see `weightlift.from_pretrained`."""
    if issubclass(cls, DiffusionPipeline) and kwargs.get("dduf_file"):
        return load_pipeline(cls, name, **kwargs)
    if issubclass(cls, AutoModel):
        return load_auto(cls, name, **kwargs)
    if installed() or LOADING.writing:
        return cls.from_pretrained(name, *args, **kwargs)
    if issubclass(cls, _AUTO_PIPELINES):
        return _auto_pipeline(cls, name, kwargs)
    if issubclass(cls, DiffusionPipeline):
        if cls.from_pretrained.__func__ is pipeline.ORIGINAL.__func__:
            return load_pipeline(cls, name, **kwargs)
        return _overriding(cls, name, args, kwargs)
    if cls.from_pretrained.__func__ is ORIGINAL.__func__:
        return load_pretrained(cls, name, *args, **kwargs)
    return _overriding(cls, name, args, kwargs)


def from_single_file(cls: Any, file: Any, kwargs: dict[str, Any]) -> Any:
    """``cls.from_single_file(file, **kwargs)``; see `weightlift.from_single_file`."""
    method = getattr(cls, "from_single_file", None)
    if method is None:
        raise TypeError(f"{cls.__name__} has no from_single_file")
    owner = next(item for item in cls.__mro__ if "from_single_file" in item.__dict__)
    if not owner.__module__.startswith("diffusers."):
        return _somebody_elses(cls, "from_single_file", lambda: method(file, **kwargs))
    return load_single_file(cls, file, **kwargs)


def load_single_file(cls: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``from_single_file`` of a model or pipeline class that has none of its own."""
    if issubclass(cls, DiffusionPipeline):
        return single_pipeline.load_pipeline(loader, cls, *args, **kwargs)
    return single_file.load_model(cls, *args, **kwargs)


def _facade(cls: Any) -> Facade:
    """A class as code of Diffusers sees it, with our ``from_pretrained`` where there is one."""
    return Facade(cls, lambda name, /, *args, **kwargs: (loader(cls) or cls.from_pretrained)(name, *args, **kwargs))


def loader(cls: Any) -> Callable[..., Any] | None:
    """Our ``from_pretrained`` for a class of either library; None where there is none."""
    if handles(cls):
        return lambda name, /, *args, **kwargs: from_pretrained(cls, name, args, kwargs)
    if "transformers" in sys.modules:
        from weightlift.integrations.transformers import classes as transformers_classes

        if transformers_classes.handles(cls):
            return lambda name, /, *args, **kwargs: transformers_classes.from_pretrained(cls, name, args, kwargs)
    return None


def load_pipeline(cls: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``from_pretrained`` of a pipeline class that has none of its own, out of a folder or of an archive."""
    load = dduf.load_archive if kwargs.get("dduf_file") else pipeline.load_pipeline
    return load(loader, cls, *args, **kwargs)


# -- Auto classes -----------------------------------------------------------------------------------------------------


def load_auto(cls: Any, /, pretrained_model_or_path: Any = None, **kwargs: Any) -> Any:
    """``AutoModel.from_pretrained``: on a class of the call's own, because it writes to its class while it looks."""

    def candidates(*args: Any, **more: Any) -> Any:
        found, others = get_class_obj_and_candidates(*args, **more)
        return (None if found is None else _facade(found)), others

    def dynamic(*args: Any, **more: Any) -> Any:
        return _facade(get_class_from_dynamic_module(*args, **more))

    run = in_room(
        AUTO_ORIGINAL,
        {"get_class_from_dynamic_module": dynamic},
        imports={"get_class_obj_and_candidates": candidates},
    )
    mine = type(cls.__name__, (cls,), {"__module__": cls.__module__})
    return run(mine, pretrained_model_or_path, **kwargs)


def _auto_pipeline(cls: Any, name: Any, kwargs: dict[str, Any]) -> Any:
    task_class = auto_pipeline._get_task_class

    def found(*args: Any, **more: Any) -> Any:
        task = task_class(*args, **more)
        return None if task is None else _facade(task)

    run = in_room(cls.from_pretrained, {"_get_task_class": found})
    with LOADING.shared():
        return run(cls, name, **kwargs)


# -- classes with a from_pretrained of their own ----------------------------------------------------------------------


def _overriding(cls: Any, name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an overriding ``from_pretrained``: Diffusers' own in a room, somebody else's alone in the process."""
    method = cls.from_pretrained
    if issubclass(cls, LegacyModelMixin) and method.__func__ is LegacyModelMixin.from_pretrained.__func__:
        return _legacy(cls, name, *args, **kwargs)
    owner = next(item for item in cls.__mro__ if "from_pretrained" in item.__dict__)
    if owner.__module__.startswith("diffusers."):
        with LOADING.shared():
            return in_room(method, _handles_in(unwrapped(method)))(cls, name, *args, **kwargs)
    return _somebody_elses(cls, "from_pretrained", lambda: method(name, *args, **kwargs))


def _somebody_elses(cls: Any, method: str, call: Callable[[], Any]) -> Any:
    def native() -> Any:
        raise NotNative(f"a {method} of its own", "it is code that nobody here knows")

    return native_or_alone(cls, native, call)


def _handles_in(function: FunctionType) -> dict[str, Any]:
    """The model classes that a function finds among its globals: those of which it loads several into one."""
    return {
        key: _facade(value)
        for key, value in function.__globals__.items()
        if isinstance(value, type) and issubclass(value, ModelMixin) and value is not ModelMixin
    }


def _legacy(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A class that its configuration may turn into another one."""

    def remapped(config: Any, old: Any) -> Any:
        found = _fetch_remapped_cls_from_config(config, old)
        return found if found is cls else _facade(found)

    def parent(_: Any, found: Any) -> Facade:
        return Facade(found, partial(load_pretrained, found))

    run = in_room(
        LegacyModelMixin.from_pretrained, {"super": parent}, imports={"_fetch_remapped_cls_from_config": remapped}
    )
    return run(cls, *args, **kwargs)
