"""`from_pretrained` of Diffusers models: its own code for everything but building and filling the model.

That code runs in a room (`weightlift.integrations.room`): where it would replace functions of ``torch.nn.init`` and of
``nn.Module`` for the whole process, nothing happens; where it would read a file's tensors, headers are read; and a
stand-in for the class builds the model deferred and fills it by a plan.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models import modeling_utils
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging as diffusers_logging

from weightlift.ambient import outside_modes
from weightlift.checkpoint import Checkpoint, open_files
from weightlift.checkpoint.part import WHOLE, Part
from weightlift.deferred.construct import CurrentLoad
from weightlift.deferred.inventory import Inventory
from weightlift.errors import CheckpointError, CheckpointNotFound, PlanError, Problem
from weightlift.integrations.constructors import Built, built
from weightlift.integrations.deciding import decide, placed
from weightlift.integrations.diffusers.hooks import refuse_names, refuse_state_hooks, refuse_steps
from weightlift.integrations.diffusers.options import OFFLOAD, Quantisers, refuse
from weightlift.integrations.diffusers.originals import original, validated
from weightlift.integrations.exclusive import NotNative, native_or_alone
from weightlift.integrations.file_strides import made_contiguous
from weightlift.integrations.misfits import no_tensor, shapes_differ
from weightlift.integrations.not_native import refuse_allowed
from weightlift.integrations.room import Delegate, in_room
from weightlift.options import LoadOptions
from weightlift.plan.match import Supply
from weightlift.plan.records import Action, Decisions, Offer, Row
from weightlift.transfer.accelerator import require_devices
from weightlift.transfer.apply import apply
from weightlift.transfer.share import of_this_load
from weightlift.transfer.subject import Bytes, Load, Subject
from weightlift.transfer.ties import settled

ORIGINAL: Any = original(ModelMixin, "from_pretrained")
"""Diffusers' own ``from_pretrained``, whether or not `weightlift.install` has replaced it."""

_logger = modeling_utils.logger


class DoesNotFit(PlanError, ValueError):
    """A `PlanError` that is also the ValueError which Diffusers raises for shapes that differ."""


class Damaged(CheckpointError, OSError):
    """A `CheckpointError` that is also the OSError which Diffusers raises for files that it can't read."""


class Lacking(PlanError, NotImplementedError):
    """A `PlanError` that is also the NotImplementedError with which Diffusers fails on what stays on ``meta``."""


@validated(ORIGINAL)
def load_pretrained(cls: Any, /, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
    """Load a model of a `ModelMixin` class: natively, or where that is not sound, by Diffusers' own code alone in the
    process."""
    name = pretrained_model_name_or_path

    def native() -> Any:
        refuse(kwargs)
        refuse_steps(cls)
        return _in_room()(StandIn(cls), name, **kwargs)

    return native_or_alone(cls, native, lambda: ORIGINAL.__func__(cls, name, **kwargs))


def _in_room() -> Any:
    names: dict[str, Any] = {
        "no_init_weights": contextlib.nullcontext,
        "load_state_dict": headers,
        "DiffusersAutoQuantizer": Quantisers(),
    }
    accelerate = getattr(modeling_utils, "accelerate", None)
    if accelerate is not None:
        names["accelerate"] = Delegate(accelerate, init_empty_weights=contextlib.nullcontext)
    return in_room(ORIGINAL, names)


def headers(checkpoint_file: str | os.PathLike[str], disable_mmap: bool = False) -> dict[str, Any]:
    """What Diffusers takes for a state dict: the entries of a file by their keys, which it may rename."""
    checkpoint = opened([checkpoint_file])
    return {**{key: (key, checkpoint) for key in checkpoint.extras}, **{key: (key, checkpoint) for key in checkpoint}}


def opened(files: Iterable[str | os.PathLike[str]], *, part: Part = WHOLE) -> Checkpoint:
    """The headers of files that Diffusers has found; ``part`` as `open_files` takes it. Raises `Damaged`, and
    `CheckpointNotFound`, which is an OSError as well."""
    paths = tuple(Path(file).absolute() for file in files)
    if any(path.suffix == ".gguf" for path in paths):
        raise NotNative("a GGUF file", "the format holds quantised blocks, which Diffusers decodes")
    try:
        return open_files(paths, name=str(paths[0] if len(paths) == 1 else paths[0].parent), part=part)
    except CheckpointNotFound:
        raise
    except CheckpointError as error:
        refuse_allowed(error)
        raise Damaged(error.summary, error.problems) from error.__cause__


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller wants of the values, as Diffusers' own loading function gets it.

    ``assigns``: without ``low_cpu_mem_usage``, some files' tensors keep their dtype (`Filling`)."""

    name: str
    dtype: torch.dtype | None
    keep_in_fp32: tuple[str, ...]
    device_map: Mapping[str, Any] | None
    low_cpu_mem_usage: bool
    ignore_mismatched: bool
    copy: bool
    assigns: bool = True


class StandIn:
    """Stands for a model class in its own ``from_pretrained``, for one load."""

    def __init__(self, cls: Any) -> None:
        self._cls = cls
        self._dtype: torch.dtype | None = None
        self._built: Built | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cls, name)

    def _set_default_torch_dtype(self, dtype: torch.dtype) -> None:
        """What the constructor shall find to be the default dtype: it is told so by the recorder."""
        if not dtype.is_floating_point:
            raise ValueError(
                f"Can't instantiate {self.__name__} model under dtype={dtype} since it is not a floating point dtype"
            )
        _logger.info(f"Instantiating {self.__name__} model under default dtype {dtype}.")
        self._dtype = dtype

    def from_config(self, config: Any, **kwargs: Any) -> Any:
        """The model, deferred."""
        self._built = built(
            self._cls,
            lambda: self._cls.from_config(config, **kwargs),
            CurrentLoad(source=None, deferred=True, seed=torch.initial_seed()),
            default_dtype=self._dtype,
            answers=_answers(),
        )
        refuse_names(self._built.model)
        _mark(self._built)
        return self._built.model

    def _load_pretrained_model(
        self, model: Any, state_dict: Any, files: list[str], name: Any, loaded_keys: list[str], **options: Any
    ) -> tuple[Any, list[str], list[str], list[Any], None, list[str]]:
        """What Diffusers' own does: the model and the keys that were missing, unexpected, mismatched."""
        assert self._built is not None and self._built.model is model
        if "disk" in (options["device_map"] or {}).values():
            raise NotNative("offloading to disk", OFFLOAD)
        if not options["low_cpu_mem_usage"]:
            refuse_state_hooks(model, loads=False)
        wishes = Wishes(
            str(name),
            options["dtype"],
            tuple(options["keep_in_fp32_modules"] or ()),
            options["device_map"],
            bool(options["low_cpu_mem_usage"]),
            bool(options["ignore_mismatched_sizes"]),
            bool(options["disable_mmap"]),
        )
        checkpoint, offers = _offered(state_dict, files, loaded_keys)
        filling = Filling(self._cls, self._built, Provided(checkpoint, offers), wishes)
        missing, unexpected, mismatched = filling.run(loaded_keys)
        return model, missing, unexpected, mismatched, None, []


def _answers() -> Any:
    """For the models that are partly Transformers': its constructors patch the process unless they are told better."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from weightlift.integrations.transformers.init import ANSWERS

    return ANSWERS


def _mark(built: Built) -> None:
    """What those constructors leave behind all the same."""
    if "transformers.modeling_utils" in sys.modules:
        from weightlift.integrations.transformers.init import mark

        mark(built)


def _offered(state_dict: Any, files: list[str], promised: list[str]) -> tuple[Checkpoint, dict[str, Offer]]:
    """The checkpoint, and what it offers by the names that Diffusers has given its keys."""
    if state_dict is not None:
        checkpoint = next(iter(state_dict.values()))[1] if state_dict else opened(files)
        keys = {name: key for name, (key, _) in state_dict.items() if key in checkpoint}
        return checkpoint, {name: Offer(name, key, checkpoint[key]) for name, key in keys.items()}
    checkpoint = opened(files)
    absent = [key for key in promised if key not in checkpoint and key not in checkpoint.extras]
    if absent:
        problems = [Problem("no file has the key that the index promises", key=key) for key in absent]
        raise CheckpointError(f"cannot open the checkpoint {checkpoint.source}", problems)
    return checkpoint, {key: Offer(key, key, entry) for key, entry in checkpoint.items()}


@dataclass(frozen=True, slots=True)
class Provided:
    """What there is to fill a model with: a checkpoint, offers of it by the model's names, and tensors in memory by the
    keys of the offers that mean them."""

    checkpoint: Checkpoint
    offers: Mapping[str, Offer]
    computed: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Filling:
    """Gives one deferred model its values."""

    def __init__(self, cls: Any, built: Built, provided: Provided, wishes: Wishes) -> None:
        self._cls = cls
        self._provided = provided
        self._wishes = wishes
        progress = None if diffusers_logging.is_progress_bar_enabled() else False
        self._options = LoadOptions.create(
            strict=False,
            ignore_mismatched=True,
            copy=wishes.copy,
            seed=built.load.seed,
            **{"progress": progress, **of_this_load()},
        )
        inventory = Inventory.of(built.model)
        self._subject = Subject(inventory, built.recorder, post_hooks=False)  # those that count are refused before
        self._state = {slot.fqn: slot.tensor for slot in inventory.slots if slot.persistent}
        offers = {name: offer for name, offer in provided.offers.items() if name in self._state}
        assigns = wishes.assigns and not wishes.low_cpu_mem_usage
        self._assigned = self._assigned_names(offers) if assigns else frozenset()
        self._offers = made_contiguous(offers, self._state, self._assigned)

    def run(self, loaded_keys: list[str]) -> tuple[list[str], list[str], list[Any]]:
        """Plan, report as Diffusers does, read. Returns missing, unexpected and mismatched keys."""
        mismatched = self._mismatched()
        if mismatched and not self._wishes.ignore_mismatched:
            raise DoesNotFit(self._refusal(), [shapes_differ(*each) for each in mismatched])
        extras = self._provided.checkpoint.extras
        others = [name for name in loaded_keys if name in self._state and name in extras]
        if others:
            raise DoesNotFit(self._refusal(), [no_tensor(name, name, extras[name]) for name in others])
        loaded = set(loaded_keys)
        missing = [name for name in self._state if name not in loaded]
        unexpected = self._unexpected(loaded_keys)
        self._carry_out()
        self._report(missing, unexpected, mismatched)
        return missing, unexpected, mismatched

    def fill(self, *, whole: bool) -> None:
        """Plan and read, and report nothing. Raises, before anything is read, for shapes that differ and, if the
        parameters are to be ``whole``, for those that nothing provides."""
        mismatched = [shapes_differ(*each, hint=None) for each in self._mismatched()]
        provided = {id(self._state[name]) for name in self._offers}
        lacking = [
            Problem("the checkpoint lacks it", fqn=name)
            for name, tensor in self._state.items()
            if whole and id(tensor) not in provided and isinstance(tensor, torch.nn.Parameter)
        ]
        if mismatched:
            raise DoesNotFit(self._refusal(), mismatched + lacking)
        if lacking:
            raise Lacking(self._refusal(), lacking)
        self._carry_out()

    def _carry_out(self) -> None:
        decisions = self._decide()
        require_devices(decisions)
        checkpoint = self._provided.checkpoint
        source = Bytes(checkpoint.files, {**checkpoint.tensors, **self._provided.computed}, checkpoint.extras)
        with outside_modes():
            decisions = settled(decisions, source, self._options)
        apply(Load(decisions, self._subject, source, self._options))

    def _unexpected(self, loaded_keys: list[str]) -> list[str]:
        found = [key for key in loaded_keys if key not in self._state]
        for pattern in self._cls._keys_to_ignore_on_load_unexpected or ():
            found = [key for key in found if re.search(pattern, key) is None]
        return found

    def _decide(self) -> Decisions:
        supply = Supply(self._provided.checkpoint.source, self._offers, self._provided.checkpoint.files)
        emptied = self._wishes.low_cpu_mem_usage
        replaced = {name: offer for name, offer in self._offers.items() if emptied or name in self._assigned}
        decisions = decide(self._subject, supply, self._options, replaced)
        read = {row.target: row for row in decisions.rows if row.action is Action.LOADED}

        def dtype(row: Row) -> torch.dtype:
            source = read.get(row.target)
            return row.dtype if source is None or source.offer is None else self._dtype(source, source.offer)

        return placed(decisions, dtype, self._devices())

    def _dtype(self, row: Row, offer: Offer) -> torch.dtype:
        """The dtype of a value that is read."""
        wishes, entry = self._wishes, offer.entry
        if not wishes.low_cpu_mem_usage:
            return entry.dtype if row.fqn in self._assigned else row.own_dtype
        if wishes.dtype is None or not entry.dtype.is_floating_point:
            return row.own_dtype
        kept = any(part in wishes.keep_in_fp32 for part in row.fqn.split("."))
        return torch.float32 if kept else wishes.dtype

    def _assigned_names(self, offers: Mapping[str, Offer]) -> frozenset[str]:
        """What Diffusers puts in its place as the file has it, in its dtype, where it doesn't save memory: all in the
        file that holds the model's first tensor, if that has the dtype of the model's."""
        first = next(iter(self._state), None)
        offer = offers.get(first) if first is not None else None
        if offer is None or first is None or not getattr(self._cls, "_supports_param_buffer_assignment", True):
            return frozenset()
        if offer.entry.dtype != self._state[first].dtype:
            return frozenset()
        return frozenset(name for name, item in offers.items() if item.entry.file == offer.entry.file)

    def _devices(self) -> dict[str, str]:
        """Where what the checkpoint can hold goes; accelerate moves the rest when it dispatches the model."""
        places = self._wishes.device_map
        if places is None:
            return {}
        found = {}
        for name in self._state:
            prefix = name
            while prefix and prefix not in places:
                prefix = prefix.rpartition(".")[0]
            if prefix not in places:
                raise ValueError(f"{name} doesn't have any device set.")
            found[name] = str(torch.device(places[prefix]))
        return found

    def _mismatched(self) -> list[tuple[str, torch.Size, torch.Size]]:
        """What is offered in another shape than the model has it: name, that shape, the model's."""
        return [
            (name, torch.Size(offer.entry.shape), self._state[name].shape)
            for name, offer in self._offers.items()
            if offer.entry.shape != tuple(self._state[name].shape)
        ]

    def _refusal(self) -> str:
        return f"{self._wishes.name} does not fit {self._cls.__name__}; nothing was changed"

    def _report(self, missing: list[str], unexpected: list[str], mismatched: list[Any]) -> None:
        """What Diffusers logs."""
        cls, name = self._cls.__name__, self._wishes.name
        if unexpected:
            _logger.warning(
                f"Some weights of the model checkpoint at {name} were not used when initializing {cls}: \n "
                f"{[', '.join(unexpected)]}"
            )
        else:
            _logger.info(f"All model checkpoint weights were used when initializing {cls}.\n")
        if missing:
            _logger.warning(
                f"Some weights of {cls} were not initialized from the model checkpoint at {name} and are newly "
                f"initialized: {missing}\nYou should probably TRAIN this model on a down-stream task to be able to use "
                "it for predictions and inference."
            )
        elif not mismatched:
            _logger.info(
                f"All the weights of {cls} were initialized from the model checkpoint at {name}.\nIf your task is "
                f"similar to the task the model of the checkpoint was trained on, you can already use {cls} for "
                "predictions without further training."
            )
        if mismatched:
            lines = "\n".join(
                f"- {key}: found shape {found} in the checkpoint and {shape} in the model instantiated"
                for key, found, shape in mismatched
            )
            _logger.warning(
                f"Some weights of {cls} were not initialized from the model checkpoint at {name} and are newly "
                f"initialized because the shapes did not match:\n{lines}\nYou should probably TRAIN this model on a "
                "down-stream task to be able to use it for predictions and inference."
            )
