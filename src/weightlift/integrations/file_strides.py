"""How values lie in memory once their library has loaded them: as the model has them, or as their file has them.

Safetensors are row-major; a pickle may hold views of other strides, and a constructor may make a parameter that isn't
row-major (``channels_last``).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

import torch

from weightlift.deferred.inventory import has_other_users, is_lazy, storage_address, users_of
from weightlift.plan.parts import composed, part
from weightlift.plan.records import Decisions, Offer
from weightlift.plan.regions import whole
from weightlift.strides import is_row_major
from weightlift.transfer.subject import Subject


def made_contiguous(
    offers: Mapping[str, Offer], state: Mapping[str, torch.Tensor], assigned: Container[str]
) -> dict[str, Offer]:
    """The offers, of which those for contiguous tensors of the model come to lie row-major, unless their file's tensors
    are ``assigned``: what a file holds in another order is copied, not mapped."""
    return {
        name: _row_major(offer)
        if _strided(offer) and name not in assigned and not is_lazy(state[name]) and state[name].is_contiguous()
        else offer
        for name, offer in offers.items()
    }


def _strided(offer: Offer) -> bool:
    entry = offer.entry
    return entry.stride is not None and 0 not in entry.shape and not is_row_major(entry.shape, entry.stride)


def _row_major(offer: Offer) -> Offer:
    shape = offer.entry.shape
    return composed(offer.name, shape, [part(offer.entry, whole(shape), key=offer.key)], key=offer.key)


def as_in_files(decisions: Decisions, subject: Subject, offers: Mapping[str, Offer]) -> Decisions:
    """The decisions, by which names with ``offers`` that were to be filled for their strides' sake get new memory:
    their library puts the file's tensor in their place. Where that has the same strides they are filled."""
    slots = subject.inventory.slots
    names = {slot.fqn for slot in slots if slot.fqn in offers and _lies_otherwise(slot.tensor, offers[slot.fqn])}
    if not names:
        return decisions
    addresses = [storage_address(slot.tensor) for slot in slots]
    users = users_of(slots, addresses)
    alone = {
        slot.fqn
        for slot, address in zip(slots, addresses, strict=True)
        if slot.fqn in names
        and users[address] == 1
        and not has_other_users(slot.tensor, address, 1)
    }
    rows = (row._replace(in_place=False) if row.fqn in alone else row for row in decisions.rows)
    return replace(decisions, rows=tuple(rows))


def _lies_otherwise(tensor: torch.Tensor, offer: Offer) -> bool:
    return not is_lazy(tensor) and not tensor.is_contiguous() and tensor.stride() != offer.entry.stride
