"""`from_single_file` of Diffusers models: its own code, on a state dict of tensors that nobody has read.

That code infers the configuration, chooses the conversion and runs it, whatever the installed version does there. It
runs in a room (`weightlift.integrations.room`): the state dict holds `Lazy` tensors, a stand-in for the class builds
the model deferred, and what the conversion made of the tensors becomes a plan, by which each byte goes to its place.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.loaders import single_file_model, single_file_utils
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from torch.utils._pytree import tree_map

from weightlift.checkpoint.part import Part
from weightlift.deferred.inventory import Inventory
from weightlift.errors import CheckpointError
from weightlift.integrations.constructors import Built
from weightlift.integrations.diffusers.hooks import refuse_state_hooks
from weightlift.integrations.diffusers.model import Filling, Provided, StandIn, Wishes, opened
from weightlift.integrations.diffusers.options import Quantisers, refuse
from weightlift.integrations.diffusers.originals import original, validated
from weightlift.integrations.exclusive import NotNative, native_or_alone
from weightlift.integrations.lazy import Lazy, lazy_state_dict, offered, source_of
from weightlift.integrations.room import in_room

ORIGINAL: Any = original(FromOriginalModelMixin, "from_single_file")
"""Diffusers' own ``from_single_file`` of models, whether or not `weightlift.install` has replaced it."""


@validated(ORIGINAL)
def load_model(cls: Any, /, pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Any:
    """``cls.from_single_file(…)`` of a model class: natively, or where that is not sound, by Diffusers' own code alone
    in the process. A state dict that is given stays as it is."""
    given = pretrained_model_link_or_path_or_dict

    def alone() -> Any:
        return ORIGINAL.__func__(cls, _copied(given), **kwargs)

    return native_or_alone(cls, lambda: load_natively(cls, given, **kwargs), alone)


def load_natively(cls: Any, /, pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Any:
    """``cls.from_single_file(…)`` of a model class, or `NotNative`. The caller holds the lock with other readers."""
    refuse(kwargs)
    return _SingleFile(cls, kwargs).load(_copied(pretrained_model_link_or_path_or_dict))


def _copied(given: Any) -> Any:
    """A state dict of its own for conversions, which take what they use out of it; a path as it is."""
    return dict(given) if isinstance(given, dict) else given


class _SingleFile:
    """One load of a model from a single file."""

    def __init__(self, cls: Any, kwargs: Mapping[str, Any]) -> None:
        self._cls = cls
        self._stand_in = SingleFileStandIn(cls)
        self._kwargs = dict(kwargs)
        default = single_file_model._LOW_CPU_MEM_USAGE_DEFAULT
        self._low_cpu_mem_usage = bool(self._kwargs.pop("low_cpu_mem_usage", default))

    def load(self, given: Any) -> Any:
        """Run Diffusers' own code; it takes the path that fills an empty model, whichever was asked for."""
        theirs = single_file_model
        names: dict[str, Any] = {
            "_get_single_file_loadable_mapping_class": lambda _: theirs._get_single_file_loadable_mapping_class(
                self._cls
            ),
            "SINGLE_FILE_LOADABLE_CLASSES": _guarded(theirs.SINGLE_FILE_LOADABLE_CLASSES),
            "load_single_file_checkpoint": lazy_checkpoint,
            "init_empty_weights": contextlib.nullcontext,
            "load_model_dict_into_meta": self._fill,
            "DiffusersAutoQuantizer": Quantisers(),
        }
        if not self._low_cpu_mem_usage:
            names["dispatch_model"] = lambda *_, **__: None
        try:
            return in_room(ORIGINAL, names)(self._stand_in, given, low_cpu_mem_usage=True, **self._kwargs)
        finally:
            self._stand_in.done()

    def _fill(self, model: Any, state_dict: Mapping[str, Any], *, dtype: Any, device_map: Any, **options: Any) -> None:
        empty = self._low_cpu_mem_usage
        if not empty:
            refuse_state_hooks(model, loads=True)
        wishes = Wishes(
            source_of(state_dict).source,
            dtype,
            tuple(options["keep_in_fp32_modules"] or ()),
            device_map if empty else None,
            low_cpu_mem_usage=empty,
            ignore_mismatched=False,
            copy=bool(self._kwargs.get("disable_mmap")),
            assigns=False,
        )
        self._stand_in.fill(state_dict, wishes, whole=empty)


class SingleFileStandIn(StandIn):
    """Stands for a model class while one is made of a state dict."""

    def _get_signature_keys(self, _: Any) -> Any:
        return self._cls._get_signature_keys(self._cls)

    def from_config(self, config: Any, **kwargs: Any) -> Any:
        """The model, deferred. Until `done` this one object, which nobody else has yet, gives a state dict of names
        only: Diffusers asks for it to know these, and holds it while the values come, which then could not be put in
        the place of the tensors in it."""
        model = super().from_config(config, **kwargs)
        names = tuple(model.state_dict())
        model.__dict__["state_dict"] = lambda: dict.fromkeys(names)
        return model

    def done(self) -> None:
        """Let the model's state dict be an ordinary one."""
        if self._built is not None:
            self._built.model.__dict__.pop("state_dict", None)

    def fill(self, state_dict: Mapping[str, Any], wishes: Wishes, *, whole: bool) -> None:
        """Give the model that was built last its values, out of a state dict under its own names."""
        fill(self._cls, self._built, state_dict, wishes, whole=whole)


def fill(cls: Any, built: Built | None, state_dict: Mapping[str, Any], wishes: Wishes, *, whole: bool) -> None:
    """Give a deferred model its values, out of a state dict under its own names. Raises as `Filling.fill` does."""
    assert built is not None
    names = {slot.fqn: slot for slot in Inventory.of(built.model).slots if slot.persistent}
    offers, computed = offered(state_dict, names)
    Filling(cls, built, Provided(source_of(state_dict), offers, computed), wishes).fill(whole=whole)


# -- what Diffusers calls ---------------------------------------------------------------------------------------------


def lazy_checkpoint(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Diffusers' ``load_single_file_checkpoint``: finds the file, or fetches it; of the tensors it reads none."""
    run = in_room(single_file_utils.load_single_file_checkpoint, {"load_state_dict": _lazy})
    return run(*args, **kwargs)  # type: ignore[no-any-return]


def _lazy(file: str | os.PathLike[str], disable_mmap: bool = False) -> dict[str, Any]:
    return lazy_state_dict(opened([file], part=Part(("state_dict",), optional=True)))


def _guarded(classes: Mapping[str, Any]) -> dict[str, Any]:
    """The conversions of each class. One that lazy tensors don't carry is not native; configurations get values."""
    guards = {"checkpoint_mapping_fn": _careful, "config_mapping_fn": _read_whole}
    return {
        name: {key: guards.get(key, lambda it: it)(value) for key, value in functions.items()}
        for name, functions in classes.items()
    }


def _read_whole(convert: Callable[..., Any]) -> Callable[..., Any]:
    """A conversion of configurations. What it takes out of the file (statistics of latents) stays with the model."""

    @functools.wraps(convert)
    def with_values(*args: Any, **kwargs: Any) -> Any:
        made = convert(*args, **kwargs)
        return tree_map(lambda item: item.values() if isinstance(item, Lazy) else item, made)

    return with_values


def _careful(convert: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(convert)
    def careful(*args: Any, **kwargs: Any) -> Any:
        try:
            return convert(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise NotNative("a conversion that fails on tensors without values", str(error)) from error

    return careful
