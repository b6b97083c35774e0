"""`from_pretrained` of Transformers models: its own code for everything but building and filling the model.

Transformers' ``from_pretrained`` runs as it is, so that whatever it takes means what it means there. It runs with a
stand-in for the class, which answers three calls itself: what the model is built under (nothing), the constructor, and
the loading of the weights. Nothing of Transformers is replaced for that.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import core_model_loading, modeling_utils
from transformers.integrations.accelerate import expand_device_map
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_env_variable_true
from transformers.utils.loading_report import LoadStateDictInfo, log_state_dict_report
from transformers.utils.logging import is_progress_bar_enabled

from weightlift.ambient import outside_modes
from weightlift.checkpoint import Checkpoint, open_checkpoint, open_files
from weightlift.deferred.construct import CurrentLoad
from weightlift.deferred.inventory import Inventory
from weightlift.distributed.environment import another_rank_loads
from weightlift.distributed.unfilled import leave_unfilled
from weightlift.errors import CheckpointError, CheckpointNotFound, PlanError, Problem
from weightlift.integrations.constructors import Built
from weightlift.integrations.deciding import decide, placed
from weightlift.integrations.exclusive import NotNative, native_or_alone
from weightlift.integrations.misfits import no_tensor, shapes_differ
from weightlift.integrations.not_native import refuse_allowed, refuse_foreign
from weightlift.integrations.room import in_room
from weightlift.integrations.transformers.conversion import Conversion, convert
from weightlift.integrations.transformers.hooks import refuse_hooks, refuse_parts
from weightlift.integrations.transformers.init import build, initialise, tie
from weightlift.integrations.transformers.offload import Offload
from weightlift.integrations.transformers.options import refuse, refuse_fusion
from weightlift.integrations.transformers.quantised import ShapesOnly, quantiser, refuse_integers, refuse_quantised
from weightlift.options import LoadOptions
from weightlift.plan.match import Supply
from weightlift.plan.records import Action, Decisions, Row
from weightlift.transfer.accelerator import require_devices
from weightlift.transfer.apply import apply
from weightlift.transfer.share import of_this_load
from weightlift.transfer.subject import Bytes, Load, Subject
from weightlift.transfer.ties import settled

ORIGINAL: Any = PreTrainedModel.__dict__["from_pretrained"]
"""Transformers' own ``from_pretrained``, as it is while `weightlift.install` has not replaced it."""


def load_pretrained(cls: Any, name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load a model of a `PreTrainedModel` class: natively, or where that is not sound, by Transformers' own code alone
    in the process."""

    def native() -> Any:
        refuse(name, kwargs)
        refuse_hooks(cls)
        imports = {"register_fusion_patches": refuse_fusion}
        return in_room(ORIGINAL, {"get_hf_quantizer": quantiser}, imports)(StandIn(cls), name, *args, **kwargs)

    def alone() -> Any:
        method = ORIGINAL.__func__
        # A room has no wrappers: what one of theirs would see to has to be seen to here.
        run = method if hasattr(method, "__wrapped__") else in_room(method, {})
        return run(cls, name, *args, **kwargs)

    return native_or_alone(cls, native, alone)


class Damaged(CheckpointError, SafetensorError):
    """A `CheckpointError` that is also the error which Transformers lets through of damaged safetensors."""


class StandIn:
    """Stands for a model class in its own ``from_pretrained``, for one load."""

    def __init__(self, cls: Any) -> None:
        self._cls = cls
        self._dtype = torch.float32
        self._built: Built | None = None
        self._quantiser: ShapesOnly | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cls, name)

    def get_init_context(self, dtype: torch.dtype, is_quantized: bool, *_: Any) -> list[Any]:
        """What the constructor, and a quantiser after it, run under: nothing that patches."""
        if not dtype.is_floating_point:
            raise ValueError(
                f"{self.__name__} cannot be instantiated under `dtype={dtype}` as it's not a floating-point dtype"
            )
        self._dtype = dtype
        self._quantiser = ShapesOnly() if is_quantized else None
        return [] if self._quantiser is None else [self._quantiser]

    def __call__(self, config: Any, *args: Any, **kwargs: Any) -> Any:
        if self._quantiser is not None:
            refuse_quantised(config)
        load = CurrentLoad(source=config.name_or_path or None, deferred=True, seed=torch.initial_seed())

        def make() -> Any:
            return self._cls(config, *args, **kwargs)

        self._built = build(self._cls, make, config, self._dtype, load)
        refuse_parts(self._built.classes)
        if self._quantiser is not None:
            self._quantiser.show(self._built)
        return self._built.model

    def _load_pretrained_model(
        self, model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, **_: Any
    ) -> tuple[LoadStateDictInfo, Any]:
        assert self._built is not None and self._built.model is model
        offload = None
        if "disk" in (load_config.device_map or {}).values() and not another_rank_loads():
            offload = Offload(model, checkpoint_files, load_config)
        checkpoint = _open(state_dict, checkpoint_files, load_config)
        info = Filling(self._built, checkpoint, load_config, offload).run()
        return info, None if offload is None else offload.index

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: LoadStateDictInfo) -> LoadStateDictInfo:
        return loading_info


def _open(state_dict: Any, files: list[str] | None, load_config: Any) -> Checkpoint:
    if state_dict is not None:
        refuse_foreign(state_dict)
        return open_checkpoint(state_dict)
    if not files:
        raise ValueError("Neither a state dict nor checkpoint files were found.")
    index = load_config.sharded_metadata or {}
    problems = [
        Problem("the index names a file outside of its folder", file=name)
        for name in sorted(set(index.get("weight_map", {}).values()))
        if Path(name).is_absolute() or ".." in Path(name).parts
    ]
    if problems:
        raise CheckpointError("cannot open the checkpoint", problems)
    paths = tuple(Path(file).absolute() for file in files)
    try:
        return open_files(paths, name=str(load_config.pretrained_model_name_or_path))
    except CheckpointError as error:
        if not load_config.weights_only and not files[0].endswith(".safetensors"):
            raise NotNative("weights_only=False", "the pickle holds more than plain tensors") from error
        refuse_allowed(error)
        if isinstance(error, CheckpointNotFound) or not files[0].endswith(".safetensors"):
            raise
        raise Damaged(error.summary, error.problems) from error.__cause__


class Filling:
    """Gives one deferred model its values."""

    def __init__(self, built: Built, checkpoint: Checkpoint, load_config: Any, offload: Offload | None) -> None:
        self._built = built
        self._model = model = built.model
        self._checkpoint = checkpoint
        self._config = load_config
        self._offload = offload
        self._unfilled = another_rank_loads()  # accelerate sends this rank its parameters
        self._options = _options(load_config, built.load.seed)
        tie(model)
        inventory = Inventory.of(model)
        self._slots = inventory.slots
        self._state: dict[str, torch.Tensor | None] = {
            slot.fqn: slot.tensor for slot in inventory.slots if slot.persistent
        }
        self._extra_state = tuple(name for name in inventory.extra_state if _gives_extra_state(model, name))
        self._plan_dtypes = _dtype_plan(load_config.dtype_plan, self._state)
        verify = getattr(modeling_utils, "verify_tp_plan", None)
        if verify is not None and modeling_utils.logger.level >= logging.WARNING:
            verify([*self._state, *self._extra_state], getattr(model, "_tp_plan", None))

    def run(self) -> LoadStateDictInfo:
        """Plan, report as Transformers does, initialise, read. Raises before anything is read what can be known."""
        done = self._convert()
        self._refuse_others(done)
        supplied, mismatched = self._supplied(done)
        info = self._info(done, supplied, mismatched)
        self._model._adjust_missing_and_unexpected_keys(info)
        if info.conversion_errors or (info.mismatched_keys and not self._config.ignore_mismatched_sizes):
            self._report(info)
        supplied = set(self._state) if self._unfilled else supplied
        tensors = {id(tensor): tensor for name in supplied if (tensor := self._state[name]) is not None}
        as_built = self._in_files(supplied)
        for slot in self._slots:  # Transformers makes all the other parameters anew
            if slot.kind == "parameter" and slot.fqn not in as_built:
                slot.tensor.requires_grad_(slot.tensor.is_floating_point())
        inventory = self._built.extend(lambda: initialise(self._model, tensors))
        decisions, subject = self._decide(done, inventory)
        source = Bytes(self._checkpoint.files, {**self._checkpoint.tensors, **done.computed}, self._extras(done.extras))
        with outside_modes():
            decisions = settled(decisions, source, self._options, together=False)  # it compares with one name only
        load = Load(decisions, subject, source, self._options)
        rest = load if self._offload is None else self._offload.split(load)
        self._report(info)  # not before all that may leave the load to Transformers, which reports as well
        if self._offload is not None:
            self._offload.write(load, self._checkpoint)
        fill = leave_unfilled if self._unfilled else apply
        fill(rest)
        if self._offload is not None:
            self._offload.leave()
        self._finish(info)
        return info

    def _convert(self) -> Conversion:
        expected: dict[str, Any] = {**self._state, **dict.fromkeys(self._extra_state, torch.empty(0))}
        transforms = self._config.weight_mapping or []
        dtypes = {
            name: self._plan_dtypes.get(name, tensor.dtype)
            for name, tensor in self._state.items()
            if tensor is not None
        }
        quantiser = self._config.hf_quantizer
        done = convert(self._model, self._checkpoint, transforms, expected, dtypes, self._extra_state, quantiser)
        if quantiser is not None:
            refuse_integers(done.offers, self._state, dtypes)
        for name, offer in done.offers.items():
            if offer.entry.key in done.computed:  # which becomes the model's as it is
                self._plan_dtypes[name] = offer.entry.dtype
        self._model._weight_conversions = [item for item in transforms if item.was_used()]
        return done

    def _refuse_others(self, done: Conversion) -> None:
        """Transformers fails on a value that is no tensor, for a name that takes one."""
        others = [(name, key) for name, key in done.extras.items() if name in self._state]
        if others:
            raise self._misfit(no_tensor(name, key, self._checkpoint.extras[key]) for name, key in others)

    def _misfit(self, problems: Iterable[Problem]) -> PlanError:
        name = self._config.pretrained_model_name_or_path
        return PlanError(f"{name} does not fit {type(self._model).__name__}; nothing was changed", problems)

    def _extras(self, keys: Mapping[str, str]) -> dict[str, Any]:
        """The values of extra state by name. A tensor becomes what Transformers makes of it: of the dtype of the
        tensor that the module has before."""
        read = {name: key for name, key in keys.items() if key in self._checkpoint}
        given: dict[str, Any] = {}

        def ask() -> None:
            for name in read:
                given[name] = _owner(self._model, name).get_extra_state()

        if read:
            self._built.extend(ask)
        extras = {name: self._checkpoint.extras[key] for name, key in keys.items() if name not in read}
        with outside_modes():
            for name, key in read.items():
                held = self._checkpoint.tensors.get(key)
                value = self._checkpoint.read(key) if held is None else held
                was = given[name]
                extras[name] = value.to(was.dtype) if isinstance(was, torch.Tensor) else value
        return extras

    def _supplied(self, done: Conversion) -> tuple[set[str], set[tuple[str, Any, Any]]]:
        """The names that have their value from the checkpoint, ties included; and those whose shape differs."""
        mismatched = set()
        fitting: set[int] = set()
        for name, offer in done.offers.items():
            tensor = self._state[name]
            assert tensor is not None
            if offer.entry.shape == tuple(tensor.shape):
                fitting.add(id(tensor))
            else:
                mismatched.add((name, torch.Size(offer.entry.shape), tensor.shape))
        return {name for name, tensor in self._state.items() if id(tensor) in fitting}, mismatched

    def _info(self, done: Conversion, supplied: set[str], mismatched: set[Any]) -> LoadStateDictInfo:
        # To Transformers a name of another shape is there, and so are those tied to it.
        there = {id(self._state[name]) for name in supplied.union(name for name, _, _ in mismatched)}
        missing = {name for name, tensor in self._state.items() if id(tensor) not in there}
        return LoadStateDictInfo(
            missing_keys=missing | (set(self._extra_state) - set(done.extras)),
            unexpected_keys=done.unexpected,
            mismatched_keys=mismatched,
            error_msgs=[],
            conversion_errors=done.errors,
            skipped_pp_keys=set(),
        )

    def _report(self, info: LoadStateDictInfo) -> None:
        """Log what Transformers logs; raise, before anything is read, what it raises afterwards."""
        config = self._config
        log_state_dict_report(
            model=self._model,
            pretrained_model_name_or_path=config.pretrained_model_name_or_path,
            ignore_mismatched_sizes=True,
            loading_info=info,
            logger=modeling_utils.logger,
        )
        if info.mismatched_keys and not config.ignore_mismatched_sizes:
            raise self._misfit(shapes_differ(*each) for each in sorted(info.mismatched_keys))

    def _decide(self, done: Conversion, inventory: Inventory) -> tuple[Decisions, Subject]:
        subject = Subject(inventory, self._built.recorder, post_hooks=False)  # it calls no ``load_state_dict``
        supply = Supply(
            self._checkpoint.source, done.offers, self._checkpoint.files, extra_state=frozenset(done.extras)
        )
        decisions = decide(subject, supply, self._options, done.offers)
        devices = self._devices([row.fqn for row in decisions.rows])
        if devices or self._plan_dtypes:
            decisions = placed(decisions, self._dtype, devices)
        require_devices(decisions)
        return decisions, subject

    def _dtype(self, row: Row) -> torch.dtype:
        return self._plan_dtypes.get(row.fqn, row.dtype) if row.action in (Action.LOADED, Action.TIED) else row.dtype

    def _devices(self, names: list[str]) -> dict[str, str]:
        if self._config.device_map is None:
            return {}
        places = expand_device_map(self._config.device_map, names)
        return {name: str(torch.device("cpu" if place == "disk" else place)) for name, place in places.items()}

    def _in_files(self, supplied: set[str]) -> set[str]:
        """The names whose values stay there."""
        if self._offload is None:
            return set()
        places = expand_device_map(self._config.device_map, list(supplied))
        return {name for name in supplied if places[name] == "disk"}

    def _finish(self, info: LoadStateDictInfo) -> None:
        """The rest of what Transformers leaves behind: which ties turned out to be none, and what its own classes do
        where others tie (Wav2Vec2's puts in the adapter of a language)."""
        tied = getattr(self._model, "all_tied_weights_keys", {})
        for target, source in list(tied.items()):
            if self._model.get_parameter_or_buffer(target) is not self._model.get_parameter_or_buffer(source):
                del tied[target]
        owner = next(item for item in type(self._model).__mro__ if "tie_weights" in vars(item))
        if owner is not PreTrainedModel:
            self._model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)


def _gives_extra_state(model: Any, name: str) -> bool:
    """Whether the module's state dict has it: Transformers goes by that."""
    return type(_owner(model, name)).get_extra_state is not nn.Module.get_extra_state


def _owner(model: Any, name: str) -> Any:
    return model.get_submodule(name.rpartition(".")[0])


def _options(load_config: Any, seed: int | None) -> LoadOptions:
    given = {"progress": None if is_progress_bar_enabled() else False} | of_this_load()
    if is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD"):
        given["workers"] = 1
    copy = bool(load_config.disable_mmap)
    return LoadOptions.create(strict=False, ignore_mismatched=True, copy=copy, seed=seed, **given)


def _dtype_plan(plan: Mapping[str, torch.dtype] | None, names: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """The names that the model wants in another dtype than it was built with, by the patterns of its class."""
    if not plan:
        return {}
    pattern, groups, _ = core_model_loading.build_glob_alternation(list(plan))
    found: dict[str, torch.dtype] = {}
    for name in names:
        if (match := re.search(pattern, name)) is not None and match.lastgroup is not None:
            found[name] = plan[groups[match.lastgroup]]
    return found
