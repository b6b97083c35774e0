"""One model, many threads: each capture gets its own request's tensors, whatever the others do."""

from __future__ import annotations

import contextvars
import copy
import gc
import os
import random
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.capture.nets import Attention, Layer, Net, hooks_on, same, states, x
from tests.children import in_child
from torch import nn

import weightlift as wl

pytestmark = pytest.mark.timeout(500)


@pytest.fixture
def forced_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def run_threads(work: Callable[[int], None], count: int = 8, seconds: float = 480) -> None:
    """Runs ``work(number)`` in each thread at once; fails with what the threads raised, or when one does not end."""
    errors: list[str] = []
    start = threading.Barrier(count)

    def guarded(number: int) -> None:
        try:
            start.wait(60)
            work(number)
        except BaseException:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "a thread hangs"
    assert not errors, f"{len(errors)} threads failed, the first with\n{errors[0]}"


def one_forward(net: Net, draw: random.Random) -> None:
    """A forward of its own input, with one of several captures or none, compared with what it must be."""
    value = torch.full((1, 2, 8), draw.random() * 3)
    choice = draw.randrange(6)
    if choice == 0:
        net(value)
        return
    if choice == 1:
        with pytest.raises(RuntimeError), wl.capture(net, hidden="layers.*"):
            net(torch.zeros(1, 3))
        return
    expected = states(net, value)
    if choice == 2:
        with wl.capture(net, hidden="layers.*") as got:
            net(value)
        assert same(got["hidden"], expected)
    elif choice == 3:
        with wl.capture(net, weights=wl.Output(Attention, index=1), inputs=wl.Input(Layer)) as got:
            net(value)
        assert same(got["inputs"], [value, *expected[:-1]])
        assert same(got["weights"], [layer.attention(h)[1] for layer, h in zip(net.layers, got["inputs"])])
    elif choice == 4:
        with wl.capture(net, hidden=wl.Output("layers.[01]", stop=True)) as got:
            net(value)
        assert same(got["hidden"], expected[:2])
    else:
        with wl.capture(net, hidden="layers.*") as got, wl.capture(net, one="layers.1") as inner:
            net(value)
            net(value)
        assert same(got["hidden"], expected * 2)
        assert same(inner["one"], [expected[1]] * 2)


def mixed_forwards(each: int) -> None:
    torch.manual_seed(0)
    net = Net().eval()

    def work(number: int) -> None:
        draw = random.Random(number)
        with torch.no_grad():
            for _ in range(each):
                one_forward(net, draw)

    run_threads(work)
    assert hooks_on(net) == 0


def test_captures_in_eight_threads(forced_switches: None) -> None:
    mixed_forwards(40)


@pytest.mark.full
def test_ten_thousand_forwards(forced_switches: None) -> None:
    mixed_forwards(1250)


@pytest.mark.full
def test_memory_is_flat_over_ten_thousand_captures() -> None:
    net, value = Net().eval(), x()

    def capture(count: int) -> None:
        for _ in range(count):
            with wl.capture(net, hidden="layers.*", weights=wl.Output(Attention, index=1)):
                net(value)

    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    with torch.no_grad():
        capture(500)
        objects, before = len(gc.get_objects()), resident()
        capture(10_000)
        after = resident()
    assert len(gc.get_objects()) - objects < 50
    print(f"resident memory grew by {(after - before) / 1e6:.2f} MB over 10,000 captures")
    assert after - before < 5e6
    assert hooks_on(net) == 0


def test_a_users_hooks_come_and_go_meanwhile(forced_switches: None) -> None:
    net = Net().eval()
    seen: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                if number % 2:
                    with wl.capture(net, hidden="layers.*") as got:
                        net(x())
                    assert len(got["hidden"]) == 3
                else:
                    handle = net.head.register_forward_hook(lambda *_: seen.append(number))
                    net(x())
                    handle.remove()

    run_threads(work)
    assert hooks_on(net) == 0
    assert not net.head._forward_hooks


@pytest.mark.parametrize("copied", [copy.copy, nn.Module._replicate_for_data_parallel])
def test_a_shallow_copy_elsewhere_takes_no_hook_away(copied: Callable[[nn.Module], nn.Module]) -> None:
    net, value = Net(), x()
    with wl.capture(net, hidden="layers.*", given=wl.Input("head")) as got:
        for layer in [*net.layers, net.head]:
            replica = copied(layer)
            replica.forward = torch.neg  # type: ignore[method-assign, assignment]
            thread = threading.Thread(target=replica, args=(value,))
            thread.start()
            thread.join(60)
        net(value)
    assert same(got["hidden"], states(net, value))
    assert hooks_on(net) == 0


def test_replicas_in_threads_as_data_parallel_runs_them() -> None:
    """Each thread runs its own replica of the modules, which share parameters, on its part of the batch."""
    net = Net().eval()
    replicas = [Net().eval() for _ in range(4)]
    for replica in replicas:
        for (_, module), (_, source) in zip(replica.named_modules(), net.named_modules()):
            module._parameters = source._parameters
    parts = [x() for _ in replicas]
    whole = nn.ModuleList(replicas)
    with wl.capture(whole, hidden="*.layers.*") as got:
        contexts = [contextvars.copy_context() for _ in replicas]

        def work(number: int) -> None:
            contexts[number].run(replicas[number], parts[number])

        run_threads(work, 4)
    calls = got.calls("hidden")
    for number, part in enumerate(parts):
        mine = [calls[f"{number}.layers.{layer}"][0] for layer in range(3)]
        assert same(mine, states(net, part))


class _Stops:
    """Holds up the first thread that passes once it is set up; ``reached`` says that it is there."""

    def __init__(self) -> None:
        self.armed = False
        self.reached = threading.Event()
        self.go = threading.Event()

    def passed(self) -> None:
        if self.armed:
            self.armed = False
            self.reached.set()
            assert self.go.wait(60)


class _Slow(OrderedDict[int, Any]):
    def __init__(self, stops: _Stops) -> None:
        super().__init__()
        self.stops = stops

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value)
        self.stops.passed()


def _entering(stops: _Stops) -> Callable[[], object]:
    net = Net()
    net.layers[1]._forward_hooks = _Slow(stops)

    def enter() -> None:
        with wl.capture(net, hidden=wl.Output("layers.*", expect="maybe")):
            pass

    return enter


def _looking(stops: _Stops) -> Callable[[], object]:
    def layers(fqn: str, module: nn.Module) -> bool:
        stops.passed()
        return isinstance(module, Layer)

    return wl.recorder(Net(), hidden=layers).refresh


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("make", [_entering, _looking])
def test_a_child_that_is_forked_while_another_thread_is_at_work_on_a_capture(
    make: Callable[[_Stops], Callable[[], object]],
) -> None:
    stops = _Stops()
    work = make(stops)
    stops.armed = True
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert stops.reached.wait(60)
    ended = in_child(work)  # waited for ever for a thread that is not there
    stops.go.set()
    thread.join(60)
    assert ended == 0
