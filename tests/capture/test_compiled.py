"""`wl.recorder` and `wl.records`, eager and through torch.compile; and what capture does around compiled code."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.capture.nets import Answer, Attention, Layer, Mixed, Net, hooks_on, same, states, x
from tests.capture.test_capture_threads import run_threads
from torch import nn

import weightlift as wl

pytestmark = [
    pytest.mark.timeout(500),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("nothing_compiled"),
]


def compiles() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


def close(left: Any, right: Any) -> bool:
    a, b = list(left), list(right)
    return len(a) == len(b) and all(torch.allclose(one, two, atol=1e-5) for one, two in zip(a, b))


def check(record: Callable[..., Any], net: Net, rows: int = 2) -> None:
    """A call's records against what the layers give when they are called by hand."""
    value = torch.rand(1).item() * x(rows)
    with torch.no_grad():
        out, got = record(value)
        expected = states(net, value)
        assert close([out], [net.head(expected[-1])])
        assert close(got["hidden"], expected)
        inputs = [value, *expected[:-1]]
        assert close(got["weights"], [layer.attention(h)[1] for layer, h in zip(net.layers, inputs)])
        assert close(got["last"], [h[:, -1] for h in expected])


def recorder_of(net: nn.Module) -> Callable[..., Any]:
    return wl.recorder(
        net, hidden="layers.*", weights=wl.Output(Attention, index=1), last=wl.Output("layers.*", tokens=-1)
    )


def test_a_recorder_without_compiling() -> None:
    net = Net()
    record = recorder_of(net)
    for _ in range(3):
        check(record, net)
    assert hooks_on(net) == 0
    _, got = record(x())
    assert list(got.named("hidden")) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_recorder_in_threads(backend: str) -> None:
    """Zero graph breaks, one compilation, in eight threads with their own inputs."""
    net = Net(1 if backend == "inductor" else 3).eval()
    fast = torch.compile(recorder_of(net), backend=backend)
    check(fast, net)
    run_threads(lambda number: [check(fast, net) for _ in range(25)] and None)
    assert compiles() == 1
    assert not breaks()
    assert hooks_on(net) == 0
    _, got = fast(x())
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in got["last"])


def test_a_twin_shares_every_parameter_and_buffer() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).train()
    record = torch.compile(wl.recorder(net, normed="1"), backend="eager", fullgraph=True)
    value = torch.randn(16, 8)
    before = net[1].running_mean.clone()
    out, got = record(value)
    assert not torch.equal(net[1].running_mean, before), "a buffer that the forward writes is the model's own"
    (out.sum() + got["normed"][0].sum()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    with torch.no_grad():
        net[2].weight.zero_()
    assert torch.allclose(record(value)[0], net[2].bias.expand(16, 8))


def test_many_kinds_of_modules_in_compiled_code() -> None:
    mixed, value = Mixed(), x()
    taps = {
        "data": wl.Output("data", index="value"),
        "table": wl.Output("table", index="extra"),
        "ends": wl.Output("often", calls=[0, -1]),
        "often": "often",
    }
    out, got = torch.compile(wl.recorder(mixed, **taps), backend="eager", fullgraph=True)(value)
    assert close([out, value + 1, value * 2], [got["often"][2], *got["data"], *got["table"]])
    assert close(got["ends"], [got["often"][0], got["often"][2]])
    shared = Net()
    shared.layers[2] = shared.layers[0]
    _, got = torch.compile(wl.recorder(shared, hidden="layers.*"), backend="eager", fullgraph=True)(value)
    assert close(got["hidden"], states(shared, value))
    assert [len(calls) for calls in got.calls("hidden").values()] == [2, 1]
    transformer = nn.Transformer(16, 2, 2, 2, 32, batch_first=True, dropout=0.0)
    inputs = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    record = wl.recorder(transformer, encoder="encoder.layers.*", decoder=nn.TransformerDecoderLayer)
    out, got = torch.compile(record, backend="eager")(*inputs)
    with wl.capture(transformer, encoder="encoder.layers.*", decoder=nn.TransformerDecoderLayer) as want:
        transformer(*inputs)
    assert close(got["encoder"], want["encoder"]) and close(got["decoder"], want["decoder"])
    assert not breaks()


def test_modes_and_replaced_layers_are_followed() -> None:
    net = Net().eval()
    fast = torch.compile(recorder_of(net), backend="eager", fullgraph=True)
    for _ in range(3):
        for mode in (False, True):
            net.train(mode)
            check(fast, net)
    assert compiles() == 2
    net.layers[1].eval()
    check(fast, net)
    net.layers[2] = Layer()
    check(fast, net)
    net.load_state_dict(Net().state_dict())
    check(fast, net)
    net.head.weight = nn.Parameter(torch.zeros(8, 8))
    check(fast, net)
    net.head = nn.Linear(8, 8)  # no tap lies there
    check(fast, net)
    assert not breaks()


def test_hooks_that_are_set_later_are_seen_after_refresh() -> None:
    net, value = Net().eval(), x()
    record = wl.recorder(net, hidden="layers.1.out")
    fast = torch.compile(record, backend="eager")
    before = fast(value)[0]
    handle = net.layers[1].register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(fast(value)[0], before)
    assert not torch.equal(record(value)[0], before)  # where nothing is compiled it is a capture of the model itself
    for _ in range(2):
        record.refresh()
        assert torch.equal(fast(value)[0], net(value))
        handle.remove()
    assert torch.equal(fast(value)[0], before)


def test_hooks_within_layers_compiled_one_by_one_are_seen_after_refresh() -> None:
    net, value = Net().eval(), x()
    for layer in net.layers:
        layer.compile(backend="eager")
    record = wl.recorder(net, query="layers.1.attention.query")
    before = record(value)[0]
    handle = net.layers[1].attention.register_forward_hook(lambda module, args, output: (output[0] * 2, *output[1:]))
    assert torch.equal(record(value)[0], before)
    record.refresh()
    assert not torch.equal(record(value)[0], before)
    handle.remove()
    record.refresh()
    assert torch.equal(record(value)[0], before)


def test_dropout_follows_the_mode() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8)).eval()
    fast = torch.compile(wl.recorder(net, dropped="0"), backend="eager")
    value = torch.ones(64, 8)
    assert torch.equal(fast(value)[1]["dropped"][0], value)
    net.train()
    assert not torch.equal(fast(value)[1]["dropped"][0], value)
    net.eval()
    assert torch.equal(fast(value)[1]["dropped"][0], value)


def test_toggling_and_many_selections_compile_once_each() -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10))).eval()
    plain = torch.compile(net, backend="eager")
    fast = [torch.compile(wl.recorder(net, hidden=str(layer)), backend="eager") for layer in range(10)]
    for _ in range(2):
        for layer, record in enumerate(fast):
            value = x()
            plain(value)
            assert close(record(value)[1]["hidden"], [net[: layer + 1](value)])
    assert compiles() == 11
    assert not breaks()


class Branches(nn.Module):
    """Two sequences, of which the second is called through a plain list if asked for."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(OrderedDict(wanted=nn.ReLU()))
        self.second = nn.Sequential(OrderedDict(other=nn.ReLU()))
        self.listed = [self.second] if plain else []

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = self.first(value)
        return self.listed[0](value) if self.listed else self.second(value)


@pytest.mark.parametrize("by_layers", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_a_recorder_sees_what_is_added_where_nothing_was_wanted_before(plain: bool, by_layers: bool) -> None:
    net = Branches(plain)
    if by_layers:
        net.first.compile(backend="eager")
    record = wl.recorder(net, seen="*.wanted")
    fast = record if by_layers else torch.compile(record, backend="eager", fullgraph=True)
    assert len(fast(x())[1]["seen"]) == 1
    net.second.add_module("wanted", nn.Sigmoid())
    value = x()
    out, got = fast(value)
    assert torch.equal(out, net(value))
    if plain:
        with pytest.raises(wl.CaptureError, match=r"second\.wanted.*did not fire"):
            assert got["seen"]
    else:
        assert len(got["seen"]) == 2 and torch.equal(got["seen"][1], out)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_a_compiled_recorder_wants_and_is_gone_is_said_as_uncompiled(fullgraph: bool) -> None:
    net = Branches(plain=False)
    record = wl.recorder(net, seen=net.first.wanted, named="second.other")
    fast = torch.compile(record, backend="eager", fullgraph=fullgraph)
    fast(x())
    net.first.wanted, net.second = nn.Sigmoid(), nn.Sequential()
    said = []
    for run in (record, fast, fast):
        with pytest.raises(wl.CaptureError) as told:
            run(x())
        said.append((str(told.value), told.value.problems))
    assert len(said[0][1]) == 2 and said == said[:1] * 3


class Strict(nn.Module):
    """Refuses what is not two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = self.first(value)
        if value.shape[0] != 2:
            raise ValueError("two rows, please")
        return value


def test_what_fails_in_a_compiled_recorder_is_said_as_uncompiled() -> None:
    """torch gives up on the trace then and calls the same code again, whose modules it compiles one by one."""

    def refuse(value: torch.Tensor) -> torch.Tensor:
        raise ValueError("two rows, please")

    editing = wl.recorder(Strict(), seen=wl.Output("first", replace=refuse))
    plain = wl.recorder(Strict(), seen="first")
    for record, rows in ((plain, 3), (editing, 2)):
        fast = torch.compile(record, backend="eager")
        for run in (record, fast, fast):
            with pytest.raises(ValueError, match="two rows, please"):
                run(torch.ones(rows, 4))
    for run in (plain, torch.compile(plain, backend="eager")):
        for rows in (2, 3, 2):
            with contextlib.nullcontext() if rows == 2 else pytest.raises(ValueError, match="two rows, please"):
                out, got = run(torch.ones(rows, 4))
                assert torch.equal(got["seen"][0], out)


def test_what_fails_in_a_compiled_forward_with_records() -> None:
    """The next call was told that nothing had run."""

    class Recorded(Strict):
        @wl.records(seen="first")
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return super().forward(value)

    net = Recorded()
    for run in (net, torch.compile(net, backend="eager")):
        for rows in (2, 3, 2, 3, 2):
            with contextlib.nullcontext() if rows == 2 else pytest.raises(ValueError, match="two rows, please"):
                out, (seen,) = run(torch.ones(rows, 4), output_seen=True)
                assert torch.equal(seen, out)


class Catches(nn.Module):
    """Goes on with something else when its first layer fails."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        try:
            value = self.first(value)
        except Exception:  # as models do where an optional kernel may be missing
            value = value * 100
        return self.second(value)


@pytest.mark.parametrize("how", ["whole", "by layers"])
def test_a_model_that_catches_every_exception_does_not_catch_the_stop(how: str) -> None:
    net = Catches()
    if how == "by layers":
        net.first.compile(backend="eager")
    record = wl.recorder(net, seen=wl.Output("first", stop=True))
    out, got = (torch.compile(record, backend="eager", fullgraph=True) if how == "whole" else record)(torch.ones(2))
    assert out is None and same(got["seen"], [torch.ones(2)])
    assert torch.equal(net(torch.ones(2)), torch.ones(2))


class Twice(nn.Module):
    """Calls its first layer twice, and the second not always."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.ReLU(), nn.Sigmoid(), nn.Tanh()
        self.skips = skips

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = self.first(self.first(value))
        return self.third(value if self.skips else self.second(value))


@pytest.mark.parametrize("how", ["plain", "whole", "by layers"])
def test_the_stop_waits_for_every_module_however_often_another_is_called(how: str) -> None:
    for skips in (False, True):
        net = Twice(skips)
        if how == "by layers":
            net.first.compile(backend="eager")
        record = wl.recorder(net, first=wl.Output("first", stop=True), second="second")
        fast = torch.compile(record, backend="eager", fullgraph=True) if how == "whole" else record
        if not skips:
            out, got = fast(x())
            assert out is None and len(got["first"]) == 2 and len(got["second"]) == 1
            continue
        with pytest.raises(wl.CaptureError, match="second"):
            fast(x())[1]["second"]


def test_stop_edits_inputs_and_calls_in_compiled_code() -> None:
    net = Net()
    delta = torch.ones(8)
    value = x()
    stopped = torch.compile(wl.recorder(net, hidden=wl.Output("layers.0", stop=True)), backend="eager", fullgraph=True)
    out, got = stopped(value)
    assert out is None and close(got["hidden"], states(net, value)[:1])
    taps = {
        "edited": wl.Output("layers.0", replace=lambda h: h + delta),
        "inputs": wl.Input("layers.1"),
        "scale": wl.Input("layers.2", index="scale"),
        "head": wl.Output("head", calls=[0], detach=True, dtype=torch.float64),
    }
    record = wl.recorder(net, **taps)
    fast = torch.compile(record, backend="eager", fullgraph=True)
    for call in (record, fast):
        out, got = call(value)
        assert close(got["edited"], [states(net, value)[0] + delta])
        assert close(got["inputs"], got["edited"])
        assert got["scale"] == (0.5,)
        assert close([out.double()], got["head"])
        assert not got["head"][0].requires_grad


def test_gradients_flow_through_what_was_recorded() -> None:
    net = Net()
    fast = torch.compile(wl.recorder(net, hidden="layers.*"), backend="aot_eager", fullgraph=True)
    _, got = fast(x())
    got["hidden"][1].sum().backward()
    assert net.layers[1].out.weight.grad is not None
    later = net.layers[2].out.weight.grad
    assert later is None or not later.any()


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_layers_compiled_one_by_one(how: str) -> None:
    net = Net(6).eval()
    reference = copy.deepcopy(net)
    for number, layer in enumerate(net.layers):
        if how == "wrapped":
            net.layers[number] = torch.compile(layer, backend="eager")
        else:
            layer.compile(backend="eager")
    outputs = wl.recorder(net, hidden="layers.*")
    with torch.no_grad():
        value = x()
        assert close(outputs(value)[1]["hidden"], states(reference, value))
        assert compiles() == 1, "what a layer returns is taken outside of its code"
        inner = recorder_of(net)
        for _ in range(3):
            check(inner, reference)
        assert compiles() <= 3
        net.train()
        reference.train()
        check(inner, reference)
        net(value)
    run_threads(lambda number: [check(inner, reference) for _ in range(5)] and None)
    if how == "wrapped":
        with wl.capture(net, hidden="layers.*") as got:
            net(value)
        assert close(got["hidden"], states(reference, value))
    inside = r"inside compiled code \(layers.0.*recorder"
    with pytest.raises(wl.CaptureError, match=inside), wl.capture(net, weights=Attention):
        net(value)


@pytest.mark.parametrize("how", ["wrapped", "in place", "whole"])
def test_what_is_compiled_after_its_recorder_was_made(how: str) -> None:
    """It was refused, with the advice to use a recorder."""
    net, value = Net().eval(), x()
    reference = copy.deepcopy(net)
    records = {tap: wl.recorder(net, taken=tap) for tap in ("layers.*", "layers.*.attention.query")}
    for record in records.values():
        record(value)
    if how == "wrapped":
        net.layers[1] = torch.compile(net.layers[1], backend="eager")
    elif how == "in place":
        net.layers[1].compile(backend="eager")
    else:
        net.compile(backend="eager")
    for tap, record in records.items():
        with wl.capture(reference, taken=tap) as expected:
            out = reference(value)
        for _ in range(2):
            output, got = record(value)
            assert torch.equal(output, out) and same(got["taken"], expected["taken"])


@pytest.mark.parametrize("which", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("shared", [False, True])
def test_layers_compiled_one_by_one_in_a_recorder_that_is_compiled(which: tuple[int, ...], shared: bool) -> None:
    """To torch a wrapper is what it wraps; where it met that before, it failed with an AssertionError of its own."""
    net, value = Net().eval(), x()
    if shared:
        net.layers.append(net.layers[1])
    plain = copy.deepcopy(net)
    for place in which:
        net.layers[place] = torch.compile(net.layers[place], backend="eager")
    taps = {"inputs": wl.Input("layers.1"), "query": "layers.0.attention.query", "head": "head"}
    fast = {name: torch.compile(wl.recorder(net, **{name: tap}), backend="eager") for name, tap in taps.items()}
    for turn in range(3):
        if turn == 2:
            plain.layers[2] = Layer().eval()
            net.layers[2] = torch.compile(copy.deepcopy(plain.layers[2]), backend="eager")
        with wl.capture(plain, **taps) as expected:
            out = plain(value)
        for name, record in fast.items():
            output, got = record(value)
            assert torch.equal(output, out) and same(got[name], expected[name])
    assert not breaks()


def test_a_capture_around_a_compiled_model_says_what_to_use() -> None:
    net = Net()
    fast = torch.compile(net, backend="eager")
    with pytest.raises(wl.CaptureError, match=r"wl\.recorder"), wl.capture(fast, hidden="layers.*"):
        pass
    for _ in range(2):
        text = "none of its modules was seen to run.*no place for hooks"  # they did run
        with pytest.raises(wl.CaptureError, match=text), wl.capture(net, hidden="layers.*"):
            fast(x())
    fast(x())
    assert hooks_on(net) == 0
    assert compiles() <= 2
    with wl.capture(net, hidden="layers.*") as got:
        net(x())
    assert len(got["hidden"]) == 3


@pytest.mark.parametrize("which", ["model", "layers"])
def test_where_only_the_forward_was_compiled_the_recorder_that_the_error_names_records(which: str) -> None:
    net, value = Net().eval(), x()
    taps = {"hidden": wl.Output(Layer), "query": "layers.*.attention.query"}
    with wl.capture(net, **taps) as expected:
        out = net(value)
    for module in [net] if which == "model" else net.layers:
        module.forward = torch.compile(module.forward, backend="eager")  # as Transformers' documentation does
    with pytest.raises(wl.CaptureError, match=r"torch\.compile\(wl\.recorder"), wl.capture(net, **taps):
        net(value)
    output, got = torch.compile(wl.recorder(net, **taps), backend="eager", fullgraph=True)(value)
    assert torch.equal(output, out)
    assert all(same(got[name], expected[name]) for name in taps)


def test_a_capture_does_not_poison_what_is_compiled_meanwhile() -> None:
    """Compiled while captured, used while not, with fullgraph: no break, no error, no growing number of variants."""
    net = Net().eval()
    for layer in net.layers:
        layer.attention.compile(backend="eager", fullgraph=True)
    value = x()
    for _ in range(12):
        with wl.capture(net, hidden="layers.*") as got:
            net(value)
        assert len(got["hidden"]) == 3
        net(value)
    assert compiles() <= 3


def test_a_tap_that_did_not_fire_in_compiled_code() -> None:
    class Lists(Net):
        def __init__(self) -> None:
            super().__init__()
            self.copies = list(self.layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.copies:
                x = layer(x)
            return x

    fast = torch.compile(wl.recorder(Lists(), hidden="layers.*"), backend="eager")
    _, got = fast(x())
    with pytest.raises(wl.CaptureError, match=r"layers\.\{0…2\}.*plain lists"):
        got["hidden"]


@contextlib.contextmanager
def compiling_elsewhere() -> Iterator[list[int]]:
    """Compiles an unrelated module over and over in another thread; yields how often it did."""
    done = [0]
    end = threading.Event()

    def work() -> None:
        while not end.is_set():
            module = nn.Sequential(nn.Linear(4 + done[0] % 7, 8), nn.ReLU())
            code = torch.compile(module, backend="aot_eager")
            code(torch.randn(2, 4 + done[0] % 7))
            done[0] += 1

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        end.set()
        thread.join(120)


def captures_while_compiling(each: int) -> None:
    nets = [Net().eval() for _ in range(2)]
    for net in nets:
        net.load_state_dict(nets[0].state_dict())
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(1)
        return graph.forward

    fast = torch.compile(wl.recorder(nets[0], hidden="layers.*"), backend=backend)
    with torch.no_grad():
        fast(x())

    def work(number: int) -> None:
        net = nets[number % 2]
        with torch.no_grad():
            for turn in range(each):
                value = torch.full((2, 4, 8), number + turn / each)
                if turn % 4 == 3:
                    got = fast(value)[1]
                else:
                    with wl.capture(net, hidden="layers.*") as got:
                        net(value)
                assert close(got["hidden"], states(net, value))

    with compiling_elsewhere() as done:
        run_threads(work)
    print(f"{8 * each} captures in 8 threads while {done[0]} compilations ran: all right")
    assert done[0] > 0
    assert len(compiled) == 1
    assert all(hooks_on(net) == 0 for net in nets)


def test_captures_while_another_thread_compiles() -> None:
    captures_while_compiling(20)


@pytest.mark.full
def test_two_thousand_captures_while_another_thread_compiles() -> None:
    captures_while_compiling(300)


class Recorded(Net):
    @wl.records(hidden_states=Layer, attentions=wl.Output(Attention, index=1))
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": super().forward(x)}


def test_records_adds_flags_to_a_forward() -> None:
    net, value = Recorded(), x()
    assert list(net(value)) == ["out"]
    out = net(value, output_hidden_states=True)
    assert list(out) == ["out", "hidden_states"]
    assert same(out["hidden_states"], states(net, value))
    assert list(net(value, output_hidden_states=False, output_attentions=1)) == ["out", "attentions"]
    assert hooks_on(net) == 0
    pickle.dumps(net)


def test_records_in_compiled_code() -> None:
    net = Recorded().eval()
    fast = torch.compile(net, backend="eager", fullgraph=True)
    for _ in range(2):
        for mode in (False, True):
            net.train(mode)
            value = x()
            assert close(fast(value, output_hidden_states=True)["hidden_states"], states(net, value))
            assert list(fast(value)) == ["out"]
    assert not breaks()
    copied = copy.deepcopy(net)
    pickle.loads(pickle.dumps(net))(x(), output_hidden_states=True)
    copied.layers[0] = Layer()
    value = x()
    again = torch.compile(copied, backend="eager")
    assert close(again(value, output_hidden_states=True)["hidden_states"], states(copied, value))


def test_records_in_code_that_is_compiled_again() -> None:
    """What was set on the model meanwhile is seen then; by code that is there it is not (docs/capture.md)."""
    net, value = Recorded(), x()
    before = torch.compile(net, backend="eager")(value, output_hidden_states=True)
    handle = net.layers[1].register_forward_hook(lambda module, args, output: output * 2)
    torch._dynamo.reset()
    again = torch.compile(net, backend="eager")(value, output_hidden_states=True)
    assert same(again["hidden_states"], net(value, output_hidden_states=True)["hidden_states"])
    assert not torch.equal(again["out"], before["out"])
    handle.remove()


def test_records_that_are_not_complete_in_compiled_code() -> None:
    class Skips(Net):
        @wl.records(hidden_states="layers.*")
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.layers[0](x)}

    net = Skips()
    for call in (net, torch.compile(net, backend="eager")):
        with pytest.raises(wl.CaptureError, match=r"layers\.2"):
            call(x(), output_hidden_states=True)


def test_records_of_chosen_calls_in_compiled_code() -> None:
    class Often(Mixed):
        @wl.records(ends=wl.Output("often", calls=[0, -1]))
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (super().forward(x),)

    net, value = Often(), x()
    fast = torch.compile(net, backend="eager", fullgraph=True)
    for call in (net, fast):
        out, ends = call(value, output_ends=True)
        assert len(ends) == 2 and close([out], ends[1:])


@pytest.mark.parametrize("options", [{"tokens": -1}, {"detach": True}, {"clone": True, "dtype": torch.float64}])
def test_records_with_options_in_compiled_code(options: dict[str, Any]) -> None:
    """They are looked through where the code is compiled, which must break no graph."""

    class Chosen(Mixed):
        @wl.records(data=wl.Output("data", **options), often=wl.Output("often", **options))
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (super().forward(x),)

    net, value = Chosen(), x()
    taken = net(value, output_data=True, output_often=True)
    fast = torch.compile(net, backend="eager", fullgraph=True)(value, output_data=True, output_often=True)
    assert close([fast[0], fast[1][0].value, *fast[2]], [taken[0], taken[1][0].value, *taken[2]])


def test_records_and_what_a_forward_returns() -> None:
    def net_giving(make: Callable[[torch.Tensor], Any]) -> nn.Module:
        class Giving(Net):
            @wl.records(hidden_states="layers.*")
            def forward(self, x: torch.Tensor) -> Any:
                return make(super().forward(x))

        return Giving()

    value = x()
    out, hidden = net_giving(lambda t: t)(value, output_hidden_states=True)
    assert isinstance(out, torch.Tensor) and len(hidden) == 3
    first, second, hidden = net_giving(lambda t: (t, t))(value, output_hidden_states=True)
    assert first is second and len(hidden) == 3
    answer = net_giving(Answer)(value, output_hidden_states=True)
    assert len(answer.hidden_states) == 3


def test_records_in_threads() -> None:
    net = Recorded().eval()

    def work(number: int) -> None:
        for turn in range(20):
            value = torch.full((1, 2, 8), number + turn / 20)
            assert same(net(value, output_hidden_states=True)["hidden_states"], states(net, value))

    run_threads(work)
    assert hooks_on(net) == 0
