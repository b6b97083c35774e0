"""`wl.records` in compiled code: several of one model, of parts of models, of copies, and of many classes."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from tests.capture.nets import Net, same, states, x
from torch import nn

import weightlift as wl

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("nothing_compiled"),
]


class Encoder(Net):
    @wl.records(hidden="layers.*", first="layers.0", hidden_first=wl.Output("layers.2", tokens=-1))
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (super().forward(x),)


class Twofold(Encoder):
    """A method and forwards that all record something of the same name, and each something else."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.after = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    @wl.records(hidden="before.*")
    def prepare(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for layer in self.before:
            x = layer(x)
        return (x,)

    @wl.records(last="after.3")
    @wl.records(hidden="after.*")
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, before = self.prepare(x, output_hidden=True)
        x, within = super().forward(x, output_hidden=True)
        for layer in self.after:
            x = layer(x)
        return x, *before, *within


class Whole(nn.Module):
    """One part of it records, and is asked to by it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, hidden = self.encoder(x, output_hidden=True)
        return self.head(out) + sum(hidden)


def flat(values: Any) -> list[torch.Tensor]:
    return [values] if isinstance(values, torch.Tensor) else [tensor for value in values for tensor in flat(value)]


@pytest.mark.parametrize("flags", [(), ("hidden",), ("hidden", "last")])
def test_forwards_and_methods_may_record_by_the_same_name(flags: tuple[str, ...]) -> None:
    net, value = Twofold(), x()
    asked = {f"output_{name}": True for name in flags}
    fast = torch.compile(net, backend="eager", fullgraph=True)
    for _ in range(2):
        assert same(flat(fast(value, **asked)), flat(net(value, **asked)))
        net.eval()


def test_two_taps_are_not_one_that_is_called_as_both() -> None:
    net, value = Encoder(), x()
    fast = torch.compile(net, backend="eager")
    for flags in ({"output_hidden": True, "output_first": True}, {"output_hidden_first": True}):
        assert same(flat(fast(value, **flags)), flat(net(value, **flags)))


@pytest.mark.parametrize("how", ["whole", "head", "inside", "part"])
@pytest.mark.parametrize("known", [False, True])
def test_a_recorder_of_a_model_of_which_a_part_records(how: str, known: bool) -> None:
    net, value = Whole().eval(), x()
    taps = {
        "hidden": wl.Output("encoder.layers.*", replace=lambda hidden: hidden * 2),
        "inputs": wl.Input("encoder.layers.*.attention", replace=lambda given: given + 1),
        "head": "head",
    }
    with wl.capture(net, **taps) as expected:
        out = net(value)
    if known:  # the part has been asked in compiled code already
        torch.compile(net.encoder, backend="eager")(value, output_hidden=True)
    modules = {"whole": [], "head": [net.head], "inside": net.encoder.layers, "part": [net.encoder]}
    for module in modules[how]:
        module.compile(backend="eager")
    record = wl.recorder(net, **taps)
    fast = torch.compile(record, backend="eager", fullgraph=True) if how == "whole" else record
    for _ in range(2):
        output, got = fast(value)
        assert torch.equal(output, out)
        assert all(same(got[name], expected[name]) for name in taps)


def test_a_shallow_copy_is_not_what_it_was_copied_from() -> None:
    net, value = Encoder(), x()
    torch.compile(net, backend="eager")(value, output_hidden=True)
    other = copy.copy(net)
    other._modules = dict(net._modules)
    other.layers = Net().layers
    for _ in range(2):
        for model in (other, net):
            out, hidden = torch.compile(model, backend="eager")(value, output_hidden=True)
            assert same(hidden, states(model, value)) and torch.equal(out, model.head(hidden[-1]))


def test_any_number_of_classes_are_compiled() -> None:
    """torch keeps eight variants for each code object, which is the class's own."""
    value = x()
    for number in range(10):

        class Scaled(Net):
            factor = number

            @wl.records(hidden="layers.*")
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return (super().forward(x) * self.factor,)

        net = Scaled(1)
        assert same(torch.compile(net, backend="eager")(value, output_hidden=True)[1], states(net, value))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10


@pytest.mark.parametrize("how", ["plain", "whole", "by layers"])
def test_records_do_not_hold_the_model(how: str) -> None:
    net, value = Net(), x()
    if how == "by layers":
        net.layers[0].compile(backend="eager")
    record = wl.recorder(net, hidden="layers.*", head=net.head)
    _, got = (torch.compile(record, backend="eager") if how == "whole" else record)(value)
    expected = states(net, value)
    gone = weakref.ref(net), weakref.ref(net.head)
    del net, record
    torch._dynamo.reset()
    gc.collect()
    if how != "plain":
        assert [reference() for reference in gone] == [None, None]
    assert same(got["hidden"], expected)
