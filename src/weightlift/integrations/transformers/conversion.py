"""From the keys of a checkpoint to the names of a Transformers model, by the version's own conversion mapping.

Keys are named by Transformers' own function. What a converter makes (fused experts, split projections, permutations)
is traced (`weightlift.integrations.views`): its operations run on tensors without values, and what comes out are parts,
which the engine puts in place. An operation that computes runs on the values instead, which are read early for it.
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import core_model_loading as core

from weightlift.ambient import outside_modes
from weightlift.checkpoint import Checkpoint
from weightlift.checkpoint.memory import entry_of
from weightlift.integrations.transformers.names import Names, in_natural_order
from weightlift.plan.records import Offer

if TYPE_CHECKING:
    from weightlift.integrations.views import Wholes


@dataclass(slots=True)
class Conversion:
    """What a checkpoint offers under the model's names.

    ``unexpected`` are names, as Transformers reports them; ``computed`` values that had to be read early, by key;
    ``errors`` what went wrong in a converter, by the first name that it was for; ``extras`` the keys of extra state and
    of what is no tensor.
    """

    offers: dict[str, Offer] = field(default_factory=dict)
    unexpected: set[str] = field(default_factory=set)
    computed: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Group:
    """The keys that one converter makes one name of, by the pattern that they matched."""

    converter: Any
    keys: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True, slots=True)
class _Cast:
    """What Transformers makes of a checkpoint's tensor before it gives it to a converter's code."""

    quantiser: Any
    converter: Any
    dtype: torch.dtype | None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self.dtype
        if self.quantiser is not None:
            dtype = self.quantiser.get_new_dtype(self.converter, tensor, dtype)
        return tensor if dtype is None else tensor.to(dtype)


def convert(
    model: Any,
    checkpoint: Checkpoint,
    transforms: list[Any],
    expected: Mapping[str, torch.Tensor | None],
    dtypes: Mapping[str, torch.dtype],
    extra_state: Collection[str],
    quantiser: Any = None,
) -> Conversion:
    """Name and convert all keys. ``expected`` are the model's state-dict names, ``extra_state`` those of them that are
    given to ``set_extra_state``; ``dtypes`` what loaded ones become. A ``quantiser`` says what is cast to that before
    a converter computes: packed integers are not."""
    renamings = [item for item in transforms if isinstance(item, core.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, core.WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    names = Names(renamings, converters, model.base_model_prefix, expected)
    done = Conversion()
    groups: dict[str, _Group] = {}
    named = {key: names.of(key) for key in (*checkpoint, *checkpoint.extras)}
    for key in _in_order(named):
        name, pattern = named[key]
        if name not in expected:
            targets = [name]
            if pattern is not None:
                patterns = by_pattern[pattern].target_patterns
                targets = [name.replace(patterns[0], item) for item in patterns]
            done.unexpected.update(targets)
        elif key in checkpoint.extras or name in extra_state:
            done.extras[name] = key
        elif pattern is None:
            if name not in groups:
                done.offers.setdefault(name, Offer(name, key, checkpoint[key]))
        elif name not in done.offers:
            groups.setdefault(name, _Group(by_pattern[pattern])).keys[pattern].append(key)
    if groups:
        from weightlift.integrations.views import Wholes

        wholes = Wholes()
    for name, group in groups.items():
        cast = _Cast(quantiser, group.converter, dtypes.get(name))
        _convert_group(model, checkpoint, name, group, cast, done, wholes)
    for name in [name for name in done.offers if name not in expected]:
        done.unexpected.add(name)
        del done.offers[name]
    return done


def _in_order(named: Mapping[str, tuple[str, str | None]]) -> Iterable[str]:
    """The keys in Transformers' order, where it counts: where several make one name, or a converter takes any."""
    alone = len({name for name, _ in named.values()}) == len(named)
    return named if alone and all(pattern is None for _, pattern in named.values()) else in_natural_order(named)


def _convert_group(
    model: Any,
    checkpoint: Checkpoint,
    name: str,
    group: _Group,
    cast: _Cast,
    done: Conversion,
    wholes: Wholes,
) -> None:
    from weightlift.integrations.views import NotTraceable

    try:
        done.offers.update(_traced(model, checkpoint, name, group, wholes))
        return
    except (NotTraceable, ValueError, AttributeError, NotImplementedError):
        pass  # a computation, or an error: on the values it is either done or raised again
    except Exception:
        done.errors[name] = traceback.format_exc()
        return
    try:
        values = _computed(model, checkpoint, name, group, cast)
    except Exception as error:
        operations = ", ".join(type(item).__name__ for item in group.converter.operations)
        done.errors[name] = f"{traceback.format_exc()}{error}\nError: {operations} on tensors destined for {name}"
        return
    for target, value in values.items():
        key = f"{target} (computed by {', '.join(type(item).__name__ for item in group.converter.operations)})"
        done.computed[key] = value
        sources = ", ".join(k for keys in group.keys.values() for k in keys)
        done.offers[target] = Offer(target, sources, entry_of(key, value))


def _traced(
    model: Any, checkpoint: Checkpoint, name: str, group: _Group, wholes: Wholes
) -> dict[str, Offer]:
    """What a converter's code makes of tensors without values."""
    traced = {pattern: [wholes.of(checkpoint[key]) for key in keys] for pattern, keys in group.keys.items()}
    mine = [tensor for tensors in traced.values() for tensor in tensors]
    offers = _offers(_run(model, group.converter, name, traced))
    traced.clear()
    wholes.give(mine)
    return offers


def _offers(made: Mapping[str, Any]) -> dict[str, Offer]:
    from weightlift.integrations.views import NotTraceable, Traced

    offers: dict[str, Offer] = {}
    for target, value in made.items():
        if not isinstance(value, Traced):
            raise NotTraceable(f"{target} is a {type(value).__name__}")
        offers[target] = value.offer(target)
    return offers


def _run(model: Any, converter: Any, name: str, tensors: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Run a converter's own code on tensors; what it gives, by the model's names."""
    copied = deepcopy(converter)
    copied.collected_tensors = dict(tensors)
    made = copied.convert(name, model=model, config=model.config)
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def _computed(
    model: Any, checkpoint: Checkpoint, name: str, group: _Group, cast: _Cast
) -> dict[str, torch.Tensor]:
    with outside_modes():
        tensors = {pattern: [cast(checkpoint.read(key)) for key in keys] for pattern, keys in group.keys.items()}
        made = _run(model, group.converter, name, tensors)
        return {target: value.detach().contiguous() for target, value in made.items()}
