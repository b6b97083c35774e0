"""Which groups of keys may be dropped in one load, so that it proves the same as dropping each of them alone.

Transformers calls ``_init_weights`` for every module after every load, in the same order whatever was loaded; only the
marks on the tensors differ, by which their initialisers leave them alone or not. (`PreTrainedModel._initialize_weights`
says so; remote code, which may skip modules, is not surveyed.) So a missing tensor's value depends on which others are
missing only within a call that touches both. Which tensors a call touches is not guessed, but seen, at the dispatcher,
while all of them are initialised: that is what every call does at the most. Groups that no call touches both of are
dropped together: each call then finds what it would find if the one group that it touches were missing alone.

Loading depends on more than one key where several are merged into one tensor, and where names are tied. Which keys a
tensor comes from is seen by its values, as each group has its own. What has a part in a merged or tied tensor is
dropped alone, and so is what an initialiser gives other memory, which the dispatcher does not see. Where a load of
several groups differs, each of them is dropped alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tests.parity.compare import named
from tests.parity.missing import Checkpoint, Seen, faults
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from weightlift.integrations.transformers.model import ORIGINAL


class _Touches(TorchDispatchMode):
    """The storages of the tensors that calls are given, for each of the calls that are announced."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[set[int]] = []

    def announcing(self, initialise: Callable[[Any], None]) -> Callable[[Any], None]:
        def announced(module: Any) -> None:
            self.calls.append(set())
            initialise(module)

        return announced

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.calls:
            tensors = (item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor))
            self.calls[-1].update(_storage(item) for item in tensors)
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def touched(model: Any) -> list[set[int]]:
    """Initialise a model of ours anew: the storages that each call of ``_init_weights`` touches."""
    touches = _Touches()
    for item in (*model.modules(), *named(model).values()):
        item.__dict__.pop("_is_hf_initialized", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._init_weights = touches.announcing(module._init_weights)
    with touches, torch.no_grad():
        model.initialize_weights()
    return touches.calls


def in_turns(cls: Any, model: Any, checkpoint: Checkpoint) -> list[list[str]]:
    """The groups of the checkpoint's keys, those in one list that may be dropped in one load. Spends the model."""
    checkpoint.drop([])
    loaded, info = ORIGINAL.__func__(cls, checkpoint.folder, output_loading_info=True)
    state = {name: value for name, value in loaded.state_dict().items() if name not in info["missing_keys"]}
    targets = checkpoint.targets(state)
    storages = {name: _storage(tensor) for name, tensor in named(model).items()}
    calls = touched(model)
    afterwards = {name: _storage(tensor) for name, tensor in named(model).items()}
    names_of = Counter(storages.values())
    tied = {name for tie in getattr(model, "all_tied_weights_keys", {}).items() for name in tie}

    def is_plain(name: str) -> bool:
        own = storages.get(name)
        return names_of[own] == 1 and name not in tied and afterwards.get(name) == own

    plain = [group for group in checkpoint.groups if group in targets and all(map(is_plain, targets[group]))]
    group_of = {storages[name]: group for group in plain for name in targets[group]}
    near: dict[str, set[str]] = defaultdict(set)
    for call in calls:
        found = {group_of[storage] for storage in call if storage in group_of}
        for group in found:
            near[group] |= found
    return [*_apart(plain, near), *([group] for group in checkpoint.groups if group not in plain)]


def _apart(plain: Sequence[str], near: dict[str, set[str]]) -> list[list[str]]:
    turns: list[list[str]] = []
    for group in plain:
        turn = next((turn for turn in turns if not near[group].intersection(turn)), None)
        if turn is None:
            turns.append([group])
        else:
            turn.append(group)
    return turns


def each_in_turn(
    cls: Any, model: Any, checkpoint: Checkpoint, seen: Seen | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Drop every group of keys: how many groups a load lacked, and what differed. Spends the model."""
    for turn in in_turns(cls, model, checkpoint):
        found = faults(cls, checkpoint, turn, seen)
        if len(turn) > 1 and found != []:
            alone = [f"{group}: {item}" for group in turn for item in faults(cls, checkpoint, [group], seen) or ()]
            found = alone or [f"{' and '.join(turn)}: {item}" for item in found or ()]
        yield len(turn), found or []
