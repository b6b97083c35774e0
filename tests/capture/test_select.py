"""Which modules a selector means, and that a model is walked once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tests.capture.nets import Attention, Layer, Net, same, states, x
from torch import nn
from torch.nn.utils import parametrizations

import weightlift as wl
from weightlift.capture import select as selection


def names(model: nn.Module, **taps: object) -> list[str]:
    with wl.capture(model, **taps) as got:
        model(x())
    return list(got.named(next(iter(taps))))


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("layers.*", ["layers.0", "layers.1", "layers.2"]),
        ("layers.[01]", ["layers.0", "layers.1"]),
        ("layers.1.attention", ["layers.1.attention"]),
        ("**.query", [f"layers.{i}.attention.query" for i in range(3)]),
        ("layers.*.at*.query", [f"layers.{i}.attention.query" for i in range(3)]),
        ("", [""]),
        (Attention, [f"layers.{i}.attention" for i in range(3)]),
        (["layers.0", "head", "layers.*"], ["layers.0", "layers.1", "layers.2", "head"]),
        (lambda fqn, module: fqn.endswith("2") and isinstance(module, Layer), ["layers.2"]),
    ],
)
def test_selectors(selector: object, expected: list[str]) -> None:
    assert names(Net(), tap=selector) == expected


def test_a_module_is_a_selector() -> None:
    net = Net()
    assert names(net, tap=net.layers[1]) == ["layers.1"]
    assert names(net, tap=wl.Output(net.head)) == ["head"]


def test_a_star_is_one_part_of_a_name_only() -> None:
    with pytest.raises(wl.CaptureError, match="no module matches"), wl.capture(Net(), tap="*.query"):
        pass


@pytest.mark.parametrize(
    ("selector", "hint"),
    [
        ("layer.*", r"did you mean 'layers\.\*'"),
        ("layers.7", r"'layers\.0'"),
        ("layers.0.atention", "layers.0.attention"),
        (nn.Conv2d, "no module is a Conv2d"),
        (nn.Linear(1, 1), "no part of the model"),
        (lambda fqn, module: False, "chose no module"),
        ("blocks.3.hook_resid_post", r"there are 'layers', 'head', 'layers\.\*', 'layers\.\*\.attention', 'layers"),
    ],
)
def test_nothing_found_names_what_comes_near(selector: object, hint: str) -> None:
    with pytest.raises(wl.CaptureError, match=hint), wl.capture(Net(), tap=selector):
        pass


def test_every_problem_is_in_one_error() -> None:
    with pytest.raises(wl.CaptureError) as caught, wl.capture(Net(), a="nothing", b="layers.*", c=nn.Conv1d):
        pass
    assert len(caught.value.problems) == 2


def test_shared_modules_have_one_name_and_record_every_call() -> None:
    net = Net()
    net.layers[2] = net.layers[0]
    value = x()
    with wl.capture(net, hidden="layers.*") as got:
        net(value)
    assert same(got["hidden"], states(net, value))
    assert [len(calls) for calls in got.calls("hidden").values()] == [2, 1]
    with pytest.raises(wl.CaptureError, match="called 2 times"):
        got.named("hidden")


def test_a_model_is_walked_once_per_selector(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    walks = []
    real = selection.walk
    monkeypatch.setattr(selection, "walk", lambda root: walks.append(root) or real(root))
    for _ in range(5):
        assert len(names(net, tap=Attention)) == 3
    assert len(walks) == 1


def test_changes_of_the_structure_are_seen() -> None:
    net = Net()
    assert len(names(net, tap="layers.*")) == len(names(net, tap=Layer)) == 3
    net.layers.append(Layer())
    assert len(names(net, tap="layers.*")) == len(names(net, tap=Layer)) == 4
    net.layers[1] = Layer()
    value = x()
    for selector in ("layers.*", Layer):
        with wl.capture(net, hidden=selector) as got:
            net(value)
        assert same(got["hidden"], states(net, value))


def test_taps_of_one_layer_each_look_at_the_list_of_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    net.layers.extend(Layer() for _ in range(9))
    value = x()
    counts = []
    for taps in ({"layers": "layers.*"}, {f"layer_{number}": f"layers.{number}" for number in range(12)}):
        record = wl.recorder(net, **taps)
        looks: list[object] = []
        with monkeypatch.context() as patched:
            for _ in range(2):
                with wl.capture(net, **taps) as got:
                    net(value)
                recorded = record(value)[1]
                if not looks:
                    patched.setattr(selection.Watch, "_look", counting(looks))
        assert all(same([v for name in taps for v in found[name]], states(net, value)) for found in (got, recorded))
        counts.append(len(looks))
    assert counts[0] == counts[1] > 0


def counting(looks: list[object]) -> object:
    real = selection.Watch._look
    return lambda watch: looks.append(watch) or real(watch)  # type: ignore[func-returns-value]


def test_changes_are_seen_by_taps_of_one_layer_each() -> None:
    net = Net()
    net.layers.extend(Layer() for _ in range(9))
    value = x()
    taps = {f"layer_{number}": f"layers.{number}" for number in range(12)}
    record = wl.recorder(net, **taps)
    for change in (lambda: None, lambda: net.layers.insert(1, Layer()), lambda: net.layers.pop(0)):
        change()
        with wl.capture(net, **taps) as got:
            net(value)
        for found in (got, record(value)[1]):
            assert same([found[name][0] for name in taps], states(net, value)[:12])
    net.layers.pop(0)
    for attempt in (lambda: wl.capture(net, **taps).__enter__(), lambda: record(value)):
        with pytest.raises(wl.CaptureError, match=r"layers\.11"):
            attempt()


def test_a_recorder_asks_a_predicate_and_reads_a_list_at_every_call() -> None:
    net = Net().eval()
    net.layers[0].train()
    listed = ["layers.0"]
    by_predicate = wl.recorder(net, tap=lambda fqn, module: isinstance(module, Layer) and module.training)
    by_list = wl.recorder(net, tap=listed)
    for number in range(3):
        net.eval()
        net.layers[number].train()
        listed[:] = [f"layers.{number}"]
        for record in (by_predicate, by_list):
            assert list(record(x())[1].named("tap")) == [f"layers.{number}"]


@pytest.mark.parametrize("count", [2, 12])
def test_captures_leave_nothing_for_the_collector(count: int) -> None:
    net = Net()
    net.layers.extend(Layer() for _ in range(9))
    wanted = [f"layers.{number}" for number in range(count)]
    record = wl.recorder(net, tap=wanted)

    def references() -> int:
        for _ in range(5):
            with wl.capture(net, tap=wanted):
                net(x())
            record(x())
        return sum(map(weakref.getweakrefcount, net.modules()))

    gc.collect()
    gc.disable()
    try:
        assert references() == references()
    finally:
        gc.enable()


def test_a_layer_that_is_exchanged_while_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    real = selection._by_pattern
    found = []

    def exchanging(root: nn.Module, pattern: str) -> object:
        found.append(real(root, pattern))
        if len(found) == 1:
            net.layers[1] = Layer()
            gc.collect()
        return found[-1]

    monkeypatch.setattr(selection, "_by_pattern", exchanging)
    value = x()
    with wl.capture(net, hidden="layers.*") as got:
        net(value)
    assert len(found) == 2 and same(got["hidden"], states(net, value))


def test_a_leaf_that_gets_children_is_seen() -> None:
    net = Net()
    kind = nn.utils.parametrize.ParametrizationList
    assert len(names(net, tap=nn.Linear)) == 7
    parametrizations.weight_norm(net.head)
    assert names(net, tap=kind) == ["head.parametrizations.weight"]


def test_scripted_parts_are_only_looked_at() -> None:
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 8))
    for _ in range(2):
        assert names(net, tap="*") == ["0", "1"]
    old = weakref.ref(net[0])
    net[0] = nn.Linear(8, 8)
    gc.collect()
    assert old() is None
    assert names(net, tap=nn.Linear) == ["0", "1"]


def test_remembering_holds_nothing() -> None:
    net = Net()
    names(net, tap="layers.*")
    old = weakref.ref(net.layers[0])
    net.layers[0] = Layer()
    gc.collect()
    assert old() is None
    whole = weakref.ref(net)
    names(net, tap=Layer)
    del net
    gc.collect()
    assert whole() is None


@pytest.mark.parametrize("where", ["at", "tokens"])
def test_remembering_holds_no_mask(where: str) -> None:
    net = Net()
    mask = torch.tensor([0, 1])
    options: dict[str, Any] = {where: mask}
    with wl.capture(net, part=wl.Output("layers.0", **options)) as got:
        net(x())
    reference = weakref.ref(mask)
    del mask, options, got
    gc.collect()
    assert reference() is None


def test_conflicting_names() -> None:
    with pytest.raises(wl.CaptureError, match="two taps are called 'hidden_states'"):
        wl.capture(Net(), "hidden_states", hidden_states="layers.*")
    with pytest.raises(wl.CaptureError, match="no tap was given"):
        wl.capture(Net())
    with pytest.raises(wl.CaptureError, match="no selector"):
        wl.capture(Net(), tap=3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: wl.Output("a", tokens=1, at=(0,)), "both choose a part"),
        (lambda: wl.Output("a", expect="often"), "'every', 'some' or 'maybe'"),
        (lambda: wl.Output("a", calls=[]), "sequence of whole numbers"),
        (lambda: wl.Output("a", calls=[-1], stop=True), "stop with a negative call"),
        (lambda: wl.Output("a", calls=[0, -1], replace=abs), "replace with a negative call"),
        (lambda: wl.Output("a", index=lambda o: o, replace=torch.neg), "callable index"),
    ],
)
def test_options_that_contradict_each_other(make: object, text: str) -> None:
    with pytest.raises(wl.CaptureError, match=text):
        make()


def test_declared_names_need_a_declaration() -> None:
    with pytest.raises(wl.CaptureError, match="declares nothing"), wl.capture(Net(), "hidden_states"):
        pass


def test_a_class_that_was_set_later() -> None:
    class Other(nn.Linear):
        pass

    net = Net()
    net.head.__class__ = Other
    for _ in range(2):
        assert names(net, tap=Other) == ["head"]
    net.layers[1].out.__class__ = Other
    assert names(net, tap=Other) == ["layers.1.out", "head"]
    net.head.__class__ = nn.Linear
    assert names(net, tap=Other) == ["layers.1.out"]
    with pytest.raises(wl.CaptureError, match=r"head.*became one"), wl.capture(net, tap=["layers.0", Other]):
        net.head.__class__ = Other
        net(x())
    alone = nn.LazyLinear(8)
    with wl.capture(alone, tap=nn.LazyLinear):
        alone(x())
    with pytest.raises(wl.CaptureError, match="no module is a LazyLinear"):
        names(alone, tap=nn.LazyLinear)
