"""Tensors that a load makes of several of the checkpoint's, as converters of fused experts plan them."""

from __future__ import annotations

import torch
from torch import nn

from weightlift.deferred.construct import CurrentLoad, construct
from weightlift.distributed.together import Together
from weightlift.options import LoadOptions
from weightlift.plan import regions
from weightlift.plan.match import Supply, match
from weightlift.plan.parts import composed, part
from weightlift.plan.regions import whole
from weightlift.transfer.subject import Bytes, Load, Subject

EXPERTS, WIDE, DEEP = 3, 6, 10


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDE, DEEP))
        self.turned = nn.Parameter(torch.randn(DEEP, WIDE))
        self.every_other = nn.Parameter(torch.randn(WIDE, DEEP))


def separate():
    """The state as a checkpoint has it: one tensor an expert and projection."""
    torch.manual_seed(0)
    state = {f"{i}.{name}": torch.randn(WIDE, DEEP) for i in range(EXPERTS) for name in ("gate", "up")}
    return state | {"t": torch.randn(WIDE, DEEP), "h": torch.randn(WIDE, 2 * DEEP)}


def merged(state):
    """What a load makes of `separate`."""
    up = torch.stack([torch.cat([state[f"{i}.gate"], state[f"{i}.up"]]) for i in range(EXPERTS)])
    return {"up": up, "turned": state["t"].t(), "every_other": state["h"][:, ::2]}


def load_merged(ckpt, **options):
    """As `weightlift.load` does once a converter has said which parts make which tensor."""
    made = LoadOptions.create(**options)
    subject = Subject(*construct(Fused, CurrentLoad(source=None, deferred=True, seed=0)))
    offers = {offer.name: offer for offer in _offers(ckpt)}
    decisions = match(subject.inventory.spec(subject.record_at), Supply(ckpt.source, offers, ckpt.files), made)
    source, together = Bytes(ckpt.files, ckpt.tensors, {}), Together(made)
    with together.planning():
        assert together.settle(decisions, subject)
    with together.loading(), together.spread(decisions, subject):
        return together.execute(Load(decisions, subject, source, made))


def _offers(entries):
    up = whole((EXPERTS, 2 * WIDE, DEEP))
    places = [(i, name, at) for i in range(EXPERTS) for name, at in (("gate", 0), ("up", WIDE))]
    pieces = [
        part(entries[f"{i}.{name}"], regions.narrow(regions.select(up, 0, i), 0, at, WIDE)) for i, name, at in places
    ]
    yield composed("up", up.shape, pieces)
    yield composed("turned", (DEEP, WIDE), [part(regions.transpose(entries["t"], 0, 1), whole((DEEP, WIDE)))])
    yield composed("every_other", (WIDE, DEEP), [part(regions.every(entries["h"], 1, 0, 2), whole((WIDE, DEEP)))])
