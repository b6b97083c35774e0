"""Tensors of a checkpoint that nobody has read, for code of others that takes a state dict and makes another of it.

What only moves elements is followed (`weightlift.integrations.views`); a call that needs values reads those of its
arguments, and gives an ordinary tensor. So a conversion costs memory only where it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from weightlift.ambient import outside_modes
from weightlift.checkpoint import Checkpoint
from weightlift.checkpoint.entry import TensorEntry
from weightlift.checkpoint.memory import entry_of, read_mapping
from weightlift.integrations.exclusive import NotNative
from weightlift.integrations.views import NotTraceable, Traced, Wholes
from weightlift.plan.records import Offer
from weightlift.strides import row_major


class Lazy(Traced):
    """A traced tensor that is read when its values are asked for."""

    checkpoint: Checkpoint

    @staticmethod
    def over(traced: Traced, checkpoint: Checkpoint) -> Lazy:
        """The lazy tensor of the same tiles."""
        shape, dtype = traced.form
        made: Any = torch.Tensor._make_wrapper_subclass(Lazy, shape, dtype=dtype, device=torch.device("cpu"))
        made.tiles, made.form, made.checkpoint = traced.tiles, traced.form, checkpoint
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        given = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        checkpoint = next(item.checkpoint for item in given if isinstance(item, Lazy))
        if func._schema.is_mutable:
            raise NotNative("a conversion that changes tensors in place", "the file's own values are not to change")
        try:
            if not all(isinstance(item, Lazy) for item in given):
                raise NotTraceable("with other tensors")
            made = super().__torch_dispatch__(func, types, args, kwargs)
        except NotTraceable:
            with outside_modes():
                args, kwargs = tree_map(lambda item: item.values() if isinstance(item, Lazy) else item, (args, kwargs))
                return func(*args, **(kwargs or {}))
        return tree_map(lambda item: cls.over(item, checkpoint) if type(item) is Traced else item, made)

    def values(self) -> torch.Tensor:
        """The tensor, read. Raises as `Checkpoint.read` does."""
        shape, dtype = self.form
        made = torch.empty(shape, dtype=dtype, device="cpu")
        for tile in self.tiles:
            place = tuple(slice(first, first + size) for first, size in zip(tile.start, tile.size, strict=True))
            made[place] = _read(self.checkpoint, tile.entry)
        return made


def _read(checkpoint: Checkpoint, view: TensorEntry) -> torch.Tensor:
    """The elements of one of the checkpoint's tensors that a view takes."""
    whole = checkpoint[view.key]
    if view == whole:
        return checkpoint.read(view.key)
    if whole.stride is not None:
        raise NotNative("a conversion of tensors that are not row-major", "their views are not read early")
    stride = row_major(view.shape) if view.stride is None else view.stride
    offset = (view.start - whole.start) // view.dtype.itemsize
    return checkpoint.read(view.key).view(-1).as_strided(view.shape, stride, offset)


def lazy_state_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a checkpoint's values by their keys: lazy tensors, and what is no tensor as it is."""
    wholes = Wholes()
    found: dict[str, Any] = {key: checkpoint.extras[key] for key in checkpoint.extras}
    for key, entry in checkpoint.items():
        found[key] = (
            torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
            if 0 in entry.shape
            else Lazy.over(wholes.of(entry), checkpoint)
        )
    return found


def offered(
    state_dict: Mapping[str, Any], names: Mapping[str, Any]
) -> tuple[dict[str, Offer], dict[str, torch.Tensor]]:
    """What a state dict of lazy and ordinary tensors offers under those of its names that are among ``names``, and the
    ordinary tensors by the keys of their offers.

    Raises `NotNative` for what is no tensor, and `CheckpointError` for tensors without plain values.
    """
    offers: dict[str, Offer] = {}
    given: dict[str, torch.Tensor] = {}
    for name, value in state_dict.items():
        if name not in names:
            continue
        if isinstance(value, Lazy):
            offers[name] = value.offer(name)
        elif isinstance(value, torch.Tensor):
            given[name] = value.detach()
        else:
            raise NotNative(f"a {type(value).__name__} for {name}", "it is no tensor")
    computed: dict[str, torch.Tensor] = {}
    if given:
        read_mapping(given)
    for name, value in given.items():
        key = f"{name} (in memory)"
        computed[key] = value.contiguous()  # as Diffusers has it, whether the tensor becomes the model's own or not
        offers[name] = Offer(name, key, entry_of(key, computed[key]))
    return offers, computed


def source_of(state_dict: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that the lazy tensors of a state dict belong to; an empty one where all are ordinary."""
    found = next((value.checkpoint for value in state_dict.values() if isinstance(value, Lazy)), None)
    return Checkpoint("<mapping>", {}) if found is None else found
