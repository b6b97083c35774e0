"""What a module's own state-dict hooks make of a checkpoint, without reading it.

``load_state_dict`` lets a module rename, split and upgrade what it is given: pre-hooks, an overridden
``_load_from_state_dict``, ``_version``. Here such a module meets stand-ins: every key is a deferred tensor whose one
recorded call reads it from the checkpoint, and its own tensors are deferred copies. A value that comes out under
another name is a renaming and costs nothing; one that was computed is computed, for real, then and there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from weightlift.ambient import no_dispatch_modes
from weightlift.deferred.functions import FunctionRecorder
from weightlift.deferred.inventory import Inventory, is_lazy
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.tape import Node, Record, TensorRef

_aten = torch.ops.aten
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(slots=True)
class Rewritten:
    """What the hooks did. ``names``: final name → name before the hooks. ``values``: final name → (value computed by a
    hook, the module's prefix). ``excused``: names that the module does not miss. ``early``: names whose values a hook
    looked at. ``errors``: what the hooks complained of. ``extras``: final extra-state values.
    """

    names: dict[str, str] = field(default_factory=dict)
    values: dict[str, tuple[torch.Tensor, str]] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)
    early: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)


def has_state_hooks(module: nn.Module) -> bool:
    """True when ``load_state_dict`` would run code of this module's own on the state dict."""
    return (
        type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
        or "_load_from_state_dict" in module.__dict__
        or bool(module._load_state_dict_pre_hooks)
    )


def rewrite(
    inventory: Inventory,
    offered: Shapes,
    extras: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
    read: Callable[[str], torch.Tensor],
    seed: int,
) -> Rewritten | None:
    """Run the state-dict hooks of ``inventory.module`` on stand-ins for ``offered`` (name → shape, dtype).

    ``read`` fetches the value of an offered name, ``metadata`` is the ``_metadata`` of a pickled state dict. Returns
    None when no module has hooks, which is the common case and costs one look at each module.
    """
    special = [prefix for prefix, module in inventory.modules if has_state_hooks(module)]
    if not special:
        return None
    with no_dispatch_modes(), torch.no_grad():
        return _Rehearsal(inventory, metadata, read, seed, special).run(offered, extras)


class _Rehearsal:
    """One run of the hooks on stand-ins."""

    def __init__(
        self,
        inventory: Inventory,
        metadata: Mapping[str, Any] | None,
        read: Callable[[str], torch.Tensor],
        seed: int,
        special: list[str],
    ) -> None:
        self._inventory = inventory
        self._metadata = metadata
        self._read = read
        self._special = special
        self._recorder = Recorder(seed=seed)
        self._functions = FunctionRecorder(self._recorder)
        self._sources: dict[Record, str] = {}  # record of a stand-in → offered name
        self._result = Rewritten()
        self._reads: dict[Record, Node | None] = {}
        self._written: dict[str, str | torch.Tensor | None] = {}

    def run(self, offered: Shapes, extras: Mapping[str, Any]) -> Rewritten:
        state: OrderedDict[str, Any] = OrderedDict(extras)
        stand_ins = {name: self._stand_in(name, *shape) for name, shape in offered.items()}
        state.update(stand_ins)
        self._visit(self._inventory.module, "", state)
        result = self._result
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                result.extras[name] = value
            elif stand_ins.get(name) is value and name not in self._written:
                result.names[name] = name
            elif name not in self._written:
                self._settle(name, value, "")
        for name, written in self._written.items():
            if written is not None:
                self._settle(name, written, name.rpartition(".")[0])
        return result

    def _stand_in(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self._recorder:
            tensor = torch.empty(shape, dtype=dtype)
        record = self._recorder.record_of(tensor)
        if record is None:  # nothing to put off in an empty tensor
            return tensor
        self._sources[record] = name
        # Its one recorded call; a hook that looks at the values makes it run.
        self._recorder.record_source(tensor, lambda target: self._fetch(name, target))
        self._reads[record] = record.last
        return tensor

    def _fetch(self, name: str, target: torch.Tensor) -> None:
        self._result.early.append(name)
        target.copy_(self._read(name))

    def _visit(self, module: nn.Module, prefix: str, state: OrderedDict[str, Any]) -> None:
        """The order of ``nn.Module.load_state_dict``: a module first, then its children on their part of the state."""
        if has_state_hooks(module) and not any(
            tensor is not None and is_lazy(tensor) for tensor in module._parameters.values()
        ):
            self._rehearse(module, prefix, state)
        for name, child in module._modules.items():
            child_prefix = f"{prefix}{name}."
            if child is None or not any(item.startswith(child_prefix) for item in self._special):
                continue
            part = OrderedDict((key, value) for key, value in state.items() if key.startswith(child_prefix))
            before = set(part)
            self._visit(child, child_prefix, part)
            for key in before - set(part):
                del state[key]
            state.update(part)

    def _rehearse(self, module: nn.Module, prefix: str, state: OrderedDict[str, Any]) -> None:
        metadata = {} if self._metadata is None else dict(self._metadata.get(prefix[:-1], {}))
        missing: list[str] = []
        unexpected: list[str] = []
        errors: list[str] = []
        arguments = (state, prefix, metadata, True, missing, unexpected, errors)
        overridden = (
            type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
            or "_load_from_state_dict" in module.__dict__
        )
        with self._functions, self._recorder:
            if not overridden:
                for hook in list(module._load_state_dict_pre_hooks.values()):
                    hook(*arguments)
            else:
                self._load_into_double(module, prefix, arguments, missing)
        self._result.errors += [text for text in errors if not text.startswith(("size mismatch", "While copying"))]

    def _load_into_double(self, module: nn.Module, prefix: str, arguments: tuple[Any, ...], missing: list[str]) -> None:
        """Call the module's own ``_load_from_state_dict`` on a double that has stand-ins for parameters and buffers."""
        double = module.__class__.__new__(module.__class__)
        double.__dict__ = {
            **module.__dict__,
            "_parameters": {name: _own_stand_in(tensor) for name, tensor in module._parameters.items()},
            "_buffers": {name: _own_stand_in(tensor) for name, tensor in module._buffers.items()},
        }
        double._load_from_state_dict(*arguments)
        state = arguments[0]
        slots = {**double._parameters, **double._buffers}
        for name, tensor in slots.items():
            fqn = prefix + name
            if tensor is None or is_lazy(tensor) or name in module._non_persistent_buffers_set:
                continue
            written = self._last_written(tensor)
            offered = state.get(fqn)
            if written is not None:
                self._written[fqn] = written
            elif isinstance(offered, torch.Tensor) and offered.shape != tensor.shape:
                pass  # the plan reports the mismatch
            elif fqn not in missing:
                self._result.excused.add(fqn)
                self._written[fqn] = None

    def _last_written(self, tensor: torch.Tensor) -> str | torch.Tensor | None:
        """What a tensor of the double was given: an offered name, a computed value, or nothing."""
        record = self._recorder.record_of(tensor)
        if record is None or record.last is None:
            return None
        node = record.last
        if node.func is _aten.copy_.default and len(node.args) > 1:
            source = node.args[1]
            if isinstance(source, TensorRef):
                if source.record is record:
                    return None  # copied onto itself: it keeps what it has
                if self._is_offered(source):
                    return self._sources[source.record]
            elif isinstance(source, torch.Tensor):
                return source
        return tensor

    def _settle(self, name: str, value: str | torch.Tensor, owner: str) -> None:
        """Decide whether a value is one of the offered ones under another name, or was computed."""
        if isinstance(value, str):
            self._result.names[name] = value
            return
        record = self._recorder.record_of(value)
        if record is not None:
            if self._is_offered(TensorRef(record, value)):
                self._result.names[name] = self._sources[record]
                return
            self._recorder.force_tensors([value], f"state-dict hook of {owner or 'the module'}")
        self._result.values[name] = (value.detach().clone(), owner)

    def _is_offered(self, ref: TensorRef) -> bool:
        """True for an offered value as the checkpoint has it: the whole tensor, and nothing done to it."""
        return ref.record in self._sources and ref.record.last is self._reads[ref.record] and ref.is_whole()


def _own_stand_in(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or is_lazy(tensor) or tensor.layout is not torch.strided:
        return tensor
    double = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(double, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else double
