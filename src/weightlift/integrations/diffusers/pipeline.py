"""`from_pretrained` of Diffusers pipelines: its own code, with the models among the components loaded at once.

That code loads the components one after the other, in a loop. Here it goes round that loop twice: the first time each
model is begun in a thread of its own, the second time it is waited for, and what is no model (tokenizers, schedulers)
is loaded in the calling thread meanwhile. The threads share the workers and the memory budget of one load.
"""

from __future__ import annotations

import builtins
import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils
from diffusers.utils import logging as diffusers_logging

from weightlift.integrations.diffusers.options import refuse
from weightlift.integrations.diffusers.originals import original, validated
from weightlift.integrations.exclusive import NotNative, native_or_alone
from weightlift.integrations.room import Delegate, in_room
from weightlift.locks import LOADING, HelperThread
from weightlift.transfer.progress import bar
from weightlift.transfer.share import Share, shares, within

ORIGINAL: Any = original(DiffusionPipeline, "from_pretrained")
"""Diffusers' own ``from_pretrained``, whether or not `weightlift.install` has replaced it."""

Loader = Callable[[Any], Callable[..., Any] | None]
"""Gives our ``from_pretrained`` for a component's class; None for one that is no model, or not one that we know."""

_WEIGHTS = (".safetensors", ".bin")


@validated(ORIGINAL)
def load_pipeline(loader: Loader, cls: Any, /, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
    """Load a pipeline: natively, or where that is not sound, by Diffusers' own code alone in the process."""
    name = pretrained_model_name_or_path
    return native_or_alone(
        cls, lambda: load_native(loader, cls, name, kwargs), lambda: ORIGINAL.__func__(cls, name, **kwargs)
    )


def load_native(loader: Loader, cls: Any, name: Any, kwargs: dict[str, Any]) -> Any:
    """Load a pipeline natively, or raise `NotNative`. The calling thread holds the lock with other readers."""
    refuse(kwargs)
    loading = Loading(loader)
    try:
        return loading.room()(cls, name, **kwargs)
    finally:
        loading.stop()


@dataclass
class _Component:
    """One model among the components: how it is loaded, and by whom."""

    load: Callable[[], Any]
    nbytes: int
    thread: threading.Thread | None = None
    over: threading.Event = field(default_factory=threading.Event)
    value: Any = None
    error: BaseException | None = None

    def wait(self) -> None:
        """Until its thread has ended. Before Python 3.13 a thread whose `join` was interrupted counts as ended: so it
        says itself that it is over."""
        if self.thread is not None and self.thread.ident is not None:  # else it could not be started
            self.over.wait()
            self.thread.join()


@dataclass
class Loading:
    """One load of a pipeline."""

    _loader: Loader
    _round: int = 0
    _models: dict[str, _Component] = field(default_factory=dict)
    _found: dict[str, Any] = field(default_factory=dict)  # by component; a repository's code runs each time it is asked
    _cancel: threading.Event = field(default_factory=threading.Event)

    def room(self) -> Callable[..., Any]:
        """Diffusers' ``from_pretrained`` with this load's loop and component loader."""
        theirs = pipeline_utils
        names = {
            "logging": Delegate(theirs.logging, tqdm=self._twice),
            "logger": Delegate(theirs.logger, info=self._in_second(theirs.logger.info)),
            "maybe_raise_or_warn": self._in_second(theirs.maybe_raise_or_warn),
            "load_sub_model": self._load_sub_model,
            "_get_pipeline_class": _pipeline_class,
            "_get_final_device_map": _final_device_map,
        }
        return in_room(ORIGINAL, names)

    def stop(self) -> None:
        """End the threads that are still loading, because something failed; none are left afterwards.

        Nor is what they have loaded: the components know this object, a cycle.
        """
        self._cancel.set()
        for component in self._models.values():
            component.wait()
            component.value = component.error = None  # an error knows the thread's frame, and so the component
        self._models.clear()

    def _in_second(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def only(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs) if self._round != 1 else None

        return only

    def _twice(self, items: Any, **options: Any) -> Iterator[Any]:
        """The components, twice; the bar is for the second time."""
        known = list(items)
        self._round = 1
        yield from known
        self._begin()
        self._round = 2
        if not diffusers_logging.is_progress_bar_enabled():
            options["disable"] = True  # otherwise it is left to tqdm, which goes by TQDM_DISABLE
        yield from bar(known, **options)
        self._round = 3

    def _load_sub_model(self, **options: Any) -> Any:
        name = options["name"]
        if self._round == 1:
            if self._loader(self._class_of(options)) is not None:  # it is imported here, in the calling thread
                self._models[name] = _Component(lambda: self._load_one(options), self._bytes_of(options))
            return None
        component = self._models.get(name)
        return self._load_one(options) if component is None else self._result(component)

    def _class_of(self, options: dict[str, Any]) -> Any:
        found = self._found[options["name"]] = _candidates(options)
        return found[0]

    def _bytes_of(self, options: dict[str, Any]) -> int:
        return _bytes_in(options["cached_folder"], options["name"])

    def _load_one(self, options: dict[str, Any]) -> Any:
        return _load(options, self._loader, self._found[options["name"]])

    def _begin(self) -> None:
        """Start the threads, unless the caller has modes on (a device, say), which belong to this thread only."""
        if len(self._models) < 2 or torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
            return
        # The largest first: its bytes are on their way while the others are constructed.
        models = sorted(self._models.items(), key=lambda item: -item[1].nbytes)
        of_each = shares([component.nbytes for _, component in models], self._cancel)
        for (name, component), share in zip(models, of_each, strict=True):
            context = contextvars.copy_context()
            component.thread = threading.Thread(
                target=context.run,
                args=(_help, component, share, torch.is_grad_enabled()),
                name=f"weightlift-{name}",
                daemon=True,
            )
            component.thread.start()

    def _result(self, component: _Component) -> Any:
        if component.thread is None:
            return component.load()
        component.wait()
        error, component.error = component.error, None
        if isinstance(error, HelperThread):  # it has to run alone: this thread can step out of reading for it
            return component.load()
        if error is not None:
            try:
                raise error
            finally:
                del error  # it will know this frame: a cycle
        value, component.value = component.value, None
        return value


def _help(component: _Component, share: Share, grad: bool) -> None:
    """The body of a thread that loads one component."""
    try:
        with LOADING.helping(), within(share), torch.set_grad_enabled(grad):
            component.value = component.load()
    except BaseException as error:
        component.error = error
    finally:
        component.over.set()


def _pipeline_class(*args: Any, **kwargs: Any) -> Any:
    found = pipeline_utils._get_pipeline_class(*args, **kwargs)
    if found._load_connected_pipes:
        raise NotNative("a pipeline with connected pipelines", "it loads further pipelines within")
    return found


def _final_device_map(*, device_map: Any, **options: Any) -> Any:
    if device_map == "balanced":
        raise NotNative('device_map="balanced"', "Diffusers builds every component on meta to know its size")
    return pipeline_utils._get_final_device_map(device_map=device_map, **options)


# -- components -------------------------------------------------------------------------------------------------------


def _candidates(options: dict[str, Any]) -> Any:
    """The class of a component and its possible parents, as Diffusers' ``load_sub_model`` asks for them."""
    return pipeline_loading_utils.get_class_obj_and_candidates(
        options["library_name"],
        options["class_name"],
        options["importable_classes"],
        options["pipelines"],
        options["is_pipeline_module"],
        component_name=options["name"],
        cache_dir=options["cached_folder"],
        trust_remote_code=options["trust_remote_code"],
    )


def _load(options: dict[str, Any], loader: Loader, found: Any) -> Any:
    """Diffusers' ``load_sub_model``, with our loading for the component's class, which was ``found`` before."""

    def attribute(owner: Any, name: str, *default: Any) -> Any:
        if name == "from_pretrained" and (ours := loader(owner)) is not None:
            return ours
        return builtins.getattr(owner, name, *default)

    names = {"getattr": attribute, "get_class_obj_and_candidates": lambda *_, **__: found}
    # It takes the component's variant out, and a helper may have tried in vain.
    mine = {**options, "model_variants": dict(options["model_variants"])}
    return in_room(pipeline_loading_utils.load_sub_model, names)(**mine)


def _bytes_in(folder: Any, name: str) -> int:
    """About how much there is to read for a component."""
    where = Path(folder, name)
    if not where.is_dir():
        return 1
    return 1 + sum(entry.stat().st_size for entry in os.scandir(where) if entry.name.endswith(_WEIGHTS))
