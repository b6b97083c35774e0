"""Options and edits follow containers of every kind, which stay of their kind and keep what else they hold."""

from __future__ import annotations

import collections.abc
import types
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import weightlift as wl

Calls = Callable[..., Any]


@dataclass
class Partly:
    a: Any
    b: Any = field(init=False, default=None)
    late: Any = field(init=False)


@dataclass
class Wants:
    a: Any
    more: InitVar[int]

    def __post_init__(self, more: int) -> None:
        self.a = self.a + more
        self.note = more


@dataclass(init=False)
class Own:
    a: Any

    def __init__(self, *, given: Any) -> None:
        self.a = given


@dataclass(frozen=True)
class Frozen:
    a: Any


@dataclass(slots=True)
class Slots:
    a: Any


class Noted(tuple[Any, ...]):
    note: str
    a = property(lambda self: self[0])

    def __new__(cls, *items: Any) -> Noted:
        made = super().__new__(cls, items)
        made.note = "kept"
        return made


class Listed(list[Any]):
    a = property(lambda self: self[0])


def partly(value: torch.Tensor) -> Partly:
    made = Partly(value)
    made.b = value * 3
    return made


DATACLASSES = [partly, lambda value: Wants(value, 1), lambda value: Own(given=value), Frozen, Slots]
OTHERS = [
    lambda value: torch.max(value, 1),
    lambda value: Noted(value, value * 2),
    lambda value: Listed([value]),
    lambda value: types.MappingProxyType({"a": value}),
]


class Gives(nn.Module):
    def __init__(self, make: Calls) -> None:
        super().__init__()
        self.make = make

    def forward(self, value: torch.Tensor) -> Any:
        return self.make(value * 1)


def capturing(net: nn.Module, tap: Any, value: torch.Tensor) -> Any:
    with wl.capture(net, tap=tap) as got:
        out = net(value)
    return out, got["tap"][0]


def recording(net: nn.Module, tap: Any, value: torch.Tensor) -> Any:
    out, got = torch.compile(wl.recorder(net, tap=tap), backend="eager", fullgraph=True)(value)
    return out, got["tap"][0]


def parts(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [*value]
    return [*value.values()] if isinstance(value, types.MappingProxyType) else [value.a, getattr(value, "b", None)]


@pytest.mark.parametrize("call", [capturing, recording])
@pytest.mark.parametrize("make", [*DATACLASSES, *OTHERS])
def test_options_and_edits_leave_a_container_what_it_is(call: Calls, make: Calls, nothing_compiled: None) -> None:
    net, value = nn.Sequential(Gives(make)), torch.ones(2, 3, requires_grad=True)
    plain = net(value)
    _, detached = call(net, wl.Output("0", detach=True), value)
    # The compiler itself makes plain tuples and lists of such classes.
    kind = type(detached) if call is recording and isinstance(plain, Noted | Listed) else type(plain)
    assert type(detached) is kind
    for one, other in zip(parts(detached), parts(plain)):
        assert (one is other is None) or (torch.equal(one, other) and not one.requires_grad)
    index = "a" if make in DATACLASSES else 0
    edited, recorded = call(net, wl.Output("0", index=index, replace=lambda part: part * 2), value)
    assert type(edited) is (type(plain) if call is capturing else type(edited))
    first, *rest = parts(edited)
    assert torch.equal(first, parts(plain)[0] * 2) and torch.equal(recorded, first)
    for one, other in zip(rest, parts(plain)[1:]):
        assert (one is other is None) or torch.equal(one, other)
    assert getattr(edited, "note", None) == getattr(plain, "note", None) or call is recording


def test_an_element_by_its_name_in_a_tuple_of_torch() -> None:
    net, value = nn.Sequential(Gives(lambda value: torch.max(value, 1))), torch.ones(2, 3)
    for call in (capturing, recording):
        edited, _ = call(net, wl.Output("0", index="values", replace=lambda part: part * 2), value)
        assert torch.equal(edited.values, torch.full((2,), 2.0)) and not edited.indices.any()


def test_a_container_that_holds_itself() -> None:
    ring: list[Any] = [torch.ones(2, requires_grad=True)]
    ring.append({"ring": ring})
    net = nn.Sequential(Gives(lambda value: (value, ring, ring[0])))
    with (
        pytest.raises(wl.CaptureError, match="list within itself"),
        wl.capture(net, given=wl.Output("0", detach=True)) as got,
    ):
        net(torch.ones(2))
    assert not got["given"][0][1][0].requires_grad
    with wl.capture(net, given=wl.Output("0", index=0, detach=True), whole="0") as got:
        net(torch.ones(2))
    assert got["whole"][0][1] is ring


class Rows:
    """A mapping as tensordict's: its names are its keys, but it goes over its rows."""

    def __init__(self, held: dict[str, torch.Tensor]) -> None:
        self.held = held

    def keys(self) -> Any:
        return self.held.keys()

    def values(self) -> Any:
        return self.held.values()

    def items(self) -> Any:
        return self.held.items()

    def __len__(self) -> int:
        return len(next(iter(self.held.values())))

    def __iter__(self) -> Any:
        return (Rows({key: value[at] for key, value in self.held.items()}) for at in range(len(self)))

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.held[key]

    def clone(self) -> Rows:
        return Rows({key: value.clone() for key, value in self.held.items()})


collections.abc.Mapping.register(Rows)  # as tensordict's


@pytest.mark.parametrize("options", [{"clone": True}, {"detach": True}, {"dtype": torch.float64}, {"at": 0}])
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"rows": [rows]}])
def test_mapping_that_goes_over_rows_is_recorded_as_it_is_and_named(options: Any, wrap: Any) -> None:
    net = Gives(lambda value: wrap(Rows({"a": value, "b": value * 2})))
    with pytest.raises(wl.CaptureError, match="Rows") as caught, wl.capture(net, tap=wl.Output("", **options)):
        out = net(torch.ones(2, 3, requires_grad=True))
    assert "index=" in str(caught.value)
    rows = out if isinstance(out, Rows) else out["rows"][0]
    assert type(rows) is Rows  # the forward had no part in it


def test_elements_of_a_mapping_that_goes_over_rows() -> None:
    net = Gives(lambda value: Rows({"a": value, "b": value * 2}))
    value = torch.ones(2, 3)
    with wl.capture(
        net,
        key=wl.Output("", index="b", clone=True),
        place=wl.Output("", index=1, clone=True),
        whole=wl.Output("", index=lambda output: output.clone()),
    ) as got:
        net(value)
    assert torch.equal(got["key"][0], value * 2) and torch.equal(got["place"][0], value * 2)
    assert torch.equal(got["whole"][0]["a"], value)


class Fixed(collections.abc.Mapping[str, Any]):
    """A mapping that nobody can make from another one."""

    def __init__(self, *, first: Any) -> None:
        self.first = first

    def __getitem__(self, key: str) -> Any:
        if key != "first":
            raise KeyError(key)
        return self.first

    def __iter__(self) -> Any:
        return iter(["first"])

    def __len__(self) -> int:
        return 1


class Closed(dict[str, Any]):
    """A dictionary to which nothing can be written."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("it is closed")


@pytest.mark.parametrize("make", [lambda value: Fixed(first=value), lambda value: Closed(first=value)])
def test_mapping_of_which_no_other_can_be_made_is_recorded_as_it_is_and_named(make: Calls) -> None:
    net = Gives(lambda value: [make(value)])
    with pytest.raises(wl.CaptureError, match=r"Fixed|Closed"), wl.capture(net, tap=wl.Output("", detach=True)) as got:
        (out,) = net(torch.ones(2, 3, requires_grad=True))
    assert out is got["tap"][0][0]  # the forward went on
    net = Gives(lambda value: [value, make("no tensor")])
    with wl.capture(net, tap=wl.Output("", dtype=torch.float64)) as got:
        net(torch.ones(2, 3))
    assert got["tap"][0][0].dtype == torch.float64


@pytest.mark.parametrize("call", [capturing, recording])
def test_a_dtype_is_for_what_module_to_would_cast(call: Calls, nothing_compiled: None) -> None:
    def make(value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": value, "mask": value > 0, "ids": value.argmax(1), "waves": value.to(torch.complex64)}

    _, got = call(
        Gives(make), wl.Output("", dtype=torch.bfloat16, index=lambda out: [*out.values()][:3]), torch.ones(2, 3)
    )
    assert [item.dtype for item in got] == [torch.bfloat16, torch.bool, torch.int64]
    _, got = call(Gives(make), wl.Output("", dtype=torch.complex128), torch.ones(2, 3))
    assert [item.dtype for item in got.values()] == [torch.complex128, torch.bool, torch.int64, torch.complex128]
    _, got = call(Gives(make), wl.Output("", index="mask", dtype=torch.int32), torch.ones(2, 3))
    assert got.dtype == torch.int32


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"device": "meta"}, {"detach": True, "clone": True}])
def test_a_packed_sequence_stays_one(options: Any) -> None:
    """How many steps there are of each is no data: torch's own ``to`` leaves it whole numbers, on the CPU."""
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    net = nn.Sequential(nn.LSTM(3, 5))
    with wl.capture(net, steps=wl.Output("0", index=0, **options), given=wl.Input("0", **options)) as got:
        output, _ = net(packed)
    target = {key: value for key, value in options.items() if key in ("dtype", "device")}
    for found, plain in ((got["steps"][0], output), (got["given"][0], packed)):
        for one, other in zip(found, plain.to(**target)):
            assert (one.dtype, one.device) == (other.dtype, other.device)
            assert one.is_meta or torch.equal(one, other)
    assert not (options.get("detach") and got["steps"][0].data.requires_grad)
