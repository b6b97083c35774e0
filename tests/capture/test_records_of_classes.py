"""Taps that a class names with `wl.records`, asked for by name; and what is recorded, copied and pickled."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from tests.capture.nets import Attention, Layer, Net, same, states, x
from torch import nn

import weightlift as wl

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("nothing_compiled")]


class Recorded(Net):
    @wl.records(hidden_states=Layer, weights=wl.Output(Attention, index=1, tokens=-1))
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": super().forward(x)}


class Chosen(Net):
    only = "layers.0"

    @wl.records(chosen=lambda fqn, module: fqn == Chosen.only)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_captures_and_recorders_take_the_names_of_a_class() -> None:
    net, value = Recorded(), x()
    expected = net(value, output_hidden_states=True, output_weights=True)
    with wl.capture(net, "hidden_states", "weights", head="head") as got:
        net(value)
    assert list(got) == ["hidden_states", "weights", "head"]
    for name in ("hidden_states", "weights"):
        assert same(got[name], expected[name])
    for _ in range(2):  # also when it is known already
        with wl.capture(net, "hidden_states") as got:
            net(value)
        assert list(got.named("hidden_states")) == ["layers.0", "layers.1", "layers.2"]
    record = wl.recorder(net, "weights")
    for call in (record, torch.compile(record, backend="eager", fullgraph=True)):
        assert same(call(value)[1]["weights"], expected["weights"])
    with wl.capture(net, "hidden_states") as got:
        net(value, output_hidden_states=True)
    assert same(got["hidden_states"], expected["hidden_states"])


class Derived(Recorded):
    @wl.records(head="head", weights=wl.Output(Attention, index=1))
    def forward(self, x: torch.Tensor, **flags: Any) -> dict[str, torch.Tensor]:
        return super().forward(x, **flags)


class Overridden(Derived):
    def forward(self, x: torch.Tensor, **flags: Any) -> dict[str, torch.Tensor]:
        return super().forward(x, **flags)


@pytest.mark.parametrize("kind", [Derived, Overridden])
def test_a_class_that_overrides_the_forward_has_the_taps_of_the_one_it_derives_from(kind: type[Recorded]) -> None:
    net, value = kind(), x()
    expected = net(value, output_hidden_states=True, output_weights=True, output_head=True)
    with wl.capture(net, "hidden_states", "weights", "head") as got:
        net(value)
    assert all(same(got[name], expected[name]) for name in got)
    assert got["weights"][0].shape[1] > 1  # the derived class's own, which takes all positions
    record = wl.recorder(net, "hidden_states", "head")
    assert same(torch.compile(record, backend="eager")(value)[1]["hidden_states"], expected["hidden_states"])
    unknown = wl.capture(net, "hidden_state")
    with pytest.raises(wl.CaptureError, match=r"nothing of this name.*'hidden_states', 'weights', 'head'"), unknown:
        pass


def test_a_predicate_of_a_class_is_asked_anew() -> None:
    net = Chosen()
    for only in ("layers.0", "layers.1"):
        Chosen.only = only
        with wl.capture(net, "chosen") as got:
            net(x())
        assert list(got.named("chosen")) == [only]


def test_names_of_a_class_conflict_as_others_do() -> None:
    net = Recorded()
    with pytest.raises(wl.CaptureError, match="two taps are called 'weights'"):
        wl.capture(net, "weights", weights="layers.*")
    with pytest.raises(wl.CaptureError, match="two taps are called 'weights'"):
        wl.capture(net, "weights", "weights")
    with pytest.raises(wl.CaptureError, match=r"'weights' is recorded by the class's own wl\.records.*name alone"):
        wl.capture(net, wl.Declared("weights", layers=[0]))
    with pytest.raises(wl.CaptureError, match="declares nothing"), wl.capture(net, "attentions"):
        pass


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [pickled, saved, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("how", ["capture", "recorder", "compiled"])
def test_records_pickle_and_copy(again: Any, how: str) -> None:
    net, value = Net(), x()
    taps = {"hidden": "layers.*", "last": wl.Output("head", tokens=-1)}
    with torch.no_grad():
        if how == "capture":
            with wl.capture(net, **taps) as got:
                net(value)
                net(value)
        else:
            record = wl.recorder(net, **taps)
            call = torch.compile(record, backend="eager") if how == "compiled" else record
            _, got = call(value)
        expected = states(net, value)
    other = again(got)
    assert type(other) is wl.Records and repr(other) == repr(got) and list(other) == list(got)
    assert same(other["hidden"][:3], expected)
    assert list(other.calls("hidden")) == list(got.calls("hidden"))
    assert [len(values) for values in other.forwards("hidden")] == [len(values) for values in got.forwards("hidden")]
    assert again is copy.copy or other["hidden"][0].data_ptr() != got["hidden"][0].data_ptr()
    assert same(pickled(other)["last"], got["last"])


def test_records_of_an_open_capture_are_no_value_yet() -> None:
    net = Net()
    with wl.capture(net, hidden="layers.*") as got:
        net(x())
        with pytest.raises(TypeError, match="the capture is open"):
            pickle.dumps(got)
    pickle.dumps(got)


def test_what_was_wrong_stays_wrong_in_a_copy() -> None:
    class Skips(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x)

    _, got = torch.compile(wl.recorder(Skips(), hidden="layers.*"), backend="eager")(x())
    with pytest.raises(wl.CaptureError, match=r"layers\.2"):
        pickled(got)["hidden"]


def test_a_decorated_forward_may_be_decorated_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        @wl.records(first="one")
        @wl.records(second="two")
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    net = Twice()
    with wl.capture(net, "first", "second") as got:
        net(x())
    assert got.named("first").keys() | got.named("second").keys() == {"one", "two"}


@pytest.mark.parametrize("strict", [True, False])
def test_the_flags_are_arguments_of_the_forward(strict: bool) -> None:
    """Whoever looks at its signature finds them, as ``torch.export`` does before it binds what it was given."""
    parameters = inspect.signature(Recorded().forward).parameters
    assert list(parameters) == ["x", "output_hidden_states", "output_weights"]
    net, value = Recorded(), x()
    program = torch.export.export(net, (value,), {"output_hidden_states": True}, strict=strict)
    out = program.module()(value, output_hidden_states=True)
    assert same(out["hidden_states"], states(net, value))
