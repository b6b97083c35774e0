"""`from_single_file` of Diffusers pipelines: its own code, with the models among the components loaded at once.

It goes as with `from_pretrained` (`weightlift.integrations.diffusers.pipeline`). The file's header is read once; every
component converts a state dict of its own, of tensors that nobody has read.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.loaders import single_file, single_file_utils
from diffusers.loaders.single_file import FromSingleFileMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin

from weightlift.deferred.construct import CurrentLoad
from weightlift.integrations.constructors import Built
from weightlift.integrations.diffusers.model import Wishes
from weightlift.integrations.diffusers.options import refuse
from weightlift.integrations.diffusers.originals import original, validated
from weightlift.integrations.diffusers.pipeline import Loader, Loading
from weightlift.integrations.diffusers.single_file import fill, lazy_checkpoint, load_natively
from weightlift.integrations.exclusive import native_or_alone
from weightlift.integrations.lazy import Lazy, source_of
from weightlift.integrations.room import Delegate, Facade, in_room

ORIGINAL: Any = original(FromSingleFileMixin, "from_single_file")
"""Diffusers' own ``from_single_file`` of pipelines, whether or not `weightlift.install` has replaced it."""

_VAE = ("first_stage_model.", "vae.", "audio_vae.")
_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")


@validated(ORIGINAL)
def load_pipeline(loader: Loader, cls: Any, /, pretrained_model_link_or_path: Any, **kwargs: Any) -> Any:
    """Load a pipeline: natively, or where that is not sound, by Diffusers' own code alone in the process."""
    file = pretrained_model_link_or_path

    def native() -> Any:
        refuse(kwargs)
        loading = SingleFileLoading(loader, bool(kwargs.get("disable_mmap")))
        try:
            return loading.room()(cls, file, **kwargs)
        finally:
            loading.stop()

    return native_or_alone(cls, native, lambda: ORIGINAL.__func__(cls, file, **kwargs))


class SingleFileLoading(Loading):
    """One load of a pipeline from a single file."""

    def __init__(self, loader: Loader, copy: bool) -> None:
        super().__init__(loader)
        self._copy = copy

    def room(self) -> Callable[..., Any]:
        """Diffusers' ``from_single_file`` with this load's loop and component loader."""
        names = {
            "logging": Delegate(single_file.logging, tqdm=self._twice),
            "load_single_file_checkpoint": lazy_checkpoint,
            "load_single_file_sub_model": self._load_sub_model,
            "_legacy_load_safety_checker": self._safety_checker,
        }
        return in_room(ORIGINAL, names)

    def _class_of(self, options: dict[str, Any]) -> Any:
        library = options["library_name"]
        ours = options["is_pipeline_module"]
        module = getattr(options["pipelines"], library) if ours else importlib.import_module(library)
        return getattr(module, options["class_name"])

    def _bytes_of(self, options: dict[str, Any]) -> int:
        """About how much there is to read for a component: by the beginnings of keys, as publishers name them."""
        name = options["name"]
        kind = _VAE if "vae" in name else _TEXT if "text" in name else ()
        return 1 + sum(
            value.numel() * value.element_size()
            for key, value in options["checkpoint"].items()
            if isinstance(value, Lazy) and (key.startswith(kind) if kind else not key.startswith(_VAE + _TEXT))
        )

    def _load_one(self, options: dict[str, Any]) -> Any:
        """Diffusers' ``load_single_file_sub_model``, with our loading for the component's class."""

        def attribute(owner: Any, name: str, *default: Any) -> Any:
            if name == "from_single_file" and isinstance(owner, type) and issubclass(owner, FromOriginalModelMixin):
                return partial(load_natively, owner)  # or the whole pipeline is left to Diffusers: it reads the file
            if name == "from_pretrained" and (ours := self._loader(owner)) is not None:
                return lambda pretrained_model_name_or_path, **given: ours(pretrained_model_name_or_path, **given)
            return builtins.getattr(owner, name, *default)

        names = {
            "getattr": attribute,
            "create_diffusers_clip_model_from_ldm": partial(
                self._text_encoder, single_file_utils.create_diffusers_clip_model_from_ldm
            ),
            "create_diffusers_t5_model_from_checkpoint": partial(
                self._text_encoder, single_file_utils.create_diffusers_t5_model_from_checkpoint
            ),
            "_legacy_load_scheduler": _scheduler,
        }
        mine = {**options, "checkpoint": dict(options["checkpoint"])}  # conversions take what they use out of it
        return in_room(single_file.load_single_file_sub_model, names)(**mine)

    def _text_encoder(self, create: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
        """A text encoder of Transformers, by the function of Diffusers that makes it of the file."""
        stand_in = TextStandIn(cls, self._copy)
        names = {
            "init_empty_weights": contextlib.nullcontext,
            "is_accelerate_available": lambda: True,
            "load_model_dict_into_meta": stand_in.fill,
        }
        return in_room(create, names)(stand_in, *args, **kwargs)

    def _safety_checker(self, *args: Any, **kwargs: Any) -> Any:
        """Diffusers' ``_legacy_load_safety_checker``, with our loading for the model in it."""
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        load = self._loader(StableDiffusionSafetyChecker)
        assert load is not None
        ours = {"StableDiffusionSafetyChecker": Facade(StableDiffusionSafetyChecker, load)}
        return in_room(single_file_utils._legacy_load_safety_checker, {}, imports=ours)(*args, **kwargs)


def _scheduler(*args: Any, **kwargs: Any) -> Any:
    """Diffusers' ``_legacy_load_scheduler``, which writes what it is asked for into a dictionary of its module."""
    mine = {"SCHEDULER_DEFAULT_CONFIG": dict(single_file_utils.SCHEDULER_DEFAULT_CONFIG)}
    return in_room(single_file_utils._legacy_load_scheduler, mine)(*args, **kwargs)


class TextStandIn:
    """Stands for a class of Transformers while one is made of a state dict."""

    def __init__(self, cls: Any, copy: bool) -> None:
        self._cls = cls
        self._copy = copy
        self._built: Built | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cls, name)

    def __call__(self, config: Any) -> Any:
        """The model, deferred, its tied names tied."""
        from weightlift.integrations.transformers.init import build, mark, tie

        load = CurrentLoad(source=None, deferred=True, seed=torch.initial_seed())
        self._built = build(self._cls, lambda: self._cls(config), config, torch.get_default_dtype(), load)
        mark(self._built)
        tie(self._built.model)
        return self._built.model

    def fill(self, model: Any, state_dict: Mapping[str, Any], *, dtype: torch.dtype | None) -> None:
        """Give the model its values."""
        source = source_of(state_dict)
        wishes = Wishes(
            source.source, dtype, (), None,
            low_cpu_mem_usage=True, ignore_mismatched=False, copy=self._copy, assigns=False,
        )  # fmt: skip
        fill(self._cls, self._built, state_dict, wishes, whole=True)
