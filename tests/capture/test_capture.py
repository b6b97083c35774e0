"""`wl.capture` on plain modules: what is taken, what is done with it, and what is left behind."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import copy
import gc
import io
import pickle
import sys
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from tests.capture.nets import Attention, Layer, Mixed, Net, hooks_on, same, states, x
from torch import nn

import weightlift as wl
from weightlift.capture import hooks
from weightlift.capture.session import open_sessions


def test_outputs_inputs_and_elements() -> None:
    net, value = Net(), x()
    with wl.capture(
        net,
        hidden="layers.*",
        weights=wl.Output(Attention, index=1),
        before=wl.Input("layers.*"),
        scale=wl.Input("layers.0", index="scale"),
        first=wl.Input("layers.0", index=0),
        logits="head",
        called=wl.Output("layers.0.attention", index=lambda pair: pair[0].sum()),
    ) as got:
        out = net(value)
    expected = states(net, value)
    assert same(got["hidden"], expected)
    assert same(got["before"], [value, *expected[:-1]])
    assert got["scale"] == (0.5,)
    assert got["first"][0] is value
    assert got["logits"][0] is out
    assert same(got["weights"], [layer.attention(h)[1] for layer, h in zip(net.layers, got["before"])])
    assert torch.equal(got["called"][0], net.layers[0].attention(value)[0].sum())
    assert list(got) == ["hidden", "weights", "before", "scale", "first", "logits", "called"]
    assert list(got.named("hidden")) == ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(KeyError, match="'hidden'"):
        got["other"]


def test_dataclasses_dicts_and_several_calls() -> None:
    net, value = Mixed(), x()
    with wl.capture(
        net,
        whole="data",
        value=wl.Output("data", index="value"),
        entry=wl.Output("table", index="extra"),
        second=wl.Output("table", index=1),
        often="often",
        ends=wl.Output("often", calls=[0, -1]),
        late=wl.Output("often", calls=(2,)),
        cut=wl.Output("table", tokens=-1),
        half=wl.Output("data", dtype=torch.float64, detach=True),
    ) as got:
        net(value)
    assert torch.equal(got["whole"][0].extra, value * 2)
    assert torch.equal(got["value"][0], value + 1)
    assert torch.equal(got["entry"][0], value * 2)
    assert got["second"][0] is got["entry"][0]
    assert len(got["often"]) == 3
    assert same(got["ends"], [got["often"][0], got["often"][2]])
    assert same(got["late"], got["often"][2:])
    assert torch.equal(got["cut"][0]["value"], (value + 1)[:, -1])
    assert got["half"][0].value.dtype == torch.float64


def test_parts_are_copied_and_options_applied() -> None:
    net, value = Net(), x().requires_grad_()
    with wl.capture(
        net,
        last=wl.Output("layers.*", tokens=-1),
        some=wl.Output("layers.*", tokens=[0, 2]),
        view=wl.Output("layers.*", at=(slice(None), slice(1, 3)), clone=False),
        cut=wl.Output("layers.*", detach=True, dtype=torch.bfloat16),
        copied=wl.Output("head", clone=True),
    ) as got:
        out = net(value)
    expected = states(net, value)
    assert same(got["last"], [h[:, -1] for h in expected])
    assert same(got["some"], [h[:, [0, 2]] for h in expected])
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in got["last"])
    assert all(t.untyped_storage().nbytes() > t.nbytes for t in got["view"])
    assert all(t.requires_grad for t in got["last"])
    assert not any(t.requires_grad for t in got["cut"])
    assert got["cut"][0].dtype == torch.bfloat16
    assert torch.equal(got["copied"][0], out) and got["copied"][0] is not out
    got["last"][1].sum().backward()
    assert net.layers[0].out.weight.grad is not None


def test_another_device() -> None:
    net, value = Net(), x()
    with wl.capture(net, moved=wl.Output("layers.*", device="meta"), stays="layers.*") as got:
        out = net(value)
    assert [tensor.device.type for tensor in got["moved"]] == ["meta"] * 3
    assert same(got["stays"], states(net, value)) and out.device.type == "cpu"


def test_stop_leaves_the_forward() -> None:
    net = Net()
    ran = []
    net.layers[2].register_forward_pre_hook(lambda *_: ran.append(2))
    reached = False
    with wl.capture(net, hidden=wl.Output("layers.[01]", stop=True)) as got:
        net(x())
        reached = True
    assert len(got["hidden"]) == 2
    assert not reached and not ran
    assert hooks_on(net) == 0
    with wl.capture(net, inputs=wl.Input("layers.1", stop=True)) as got:
        net(x())
    assert len(got["inputs"]) == 1
    net(x())
    assert ran == [2]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup came with Python 3.11")
def test_stop_within_a_group_of_tasks() -> None:
    net, value = Net(), x()

    async def both(fails: bool) -> int:
        async def fail() -> None:
            raise ValueError("as asked for")

        with wl.capture(net, first=wl.Output("layers.0", stop=True)) as got:
            async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined, unused-ignore]
                group.create_task(asyncio.to_thread(net, value))
                if fails:
                    group.create_task(fail())
        return len(got["first"])

    assert asyncio.run(both(False)) == 1
    with pytest.raises(BaseExceptionGroup):  # noqa: F821
        asyncio.run(both(True))


def test_stop_of_one_capture_passes_another() -> None:
    net = Net()
    with wl.capture(net, all=wl.Output("layers.*", expect="some")) as outer:
        with wl.capture(net, hidden=wl.Output("layers.0", stop=True)) as inner:
            net(x())
        assert len(inner["hidden"]) == 1
    assert len(outer["all"]) == 0 or same(outer["all"], inner["hidden"])


def test_edits_in_flight() -> None:
    net, value = Net(), x()
    plain = states(net, value)
    with wl.capture(
        net,
        edited=wl.Output("layers.0", replace=lambda h: h + 1),
        inputs=wl.Input("layers.1"),
        weights=wl.Output("layers.1.attention", index=1, replace=torch.zeros_like),
    ) as got:
        net(value)
    assert torch.equal(got["edited"][0], plain[0] + 1)
    assert got["inputs"][0] is got["edited"][0]
    assert not got["weights"][0].any()
    with wl.capture(net, edited=wl.Output("layers.0", tokens=-1, replace=torch.zeros_like), whole="layers.0") as got:
        net(value)
    assert not got["whole"][0][:, -1].any()
    assert torch.equal(got["whole"][0][:, :-1], plain[0][:, :-1])
    with wl.capture(net, edited=wl.Input("layers.0", replace=torch.neg), hidden="layers.0") as got:
        net(value)
    assert torch.equal(got["hidden"][0], net.layers[0](-value, scale=0.5))


def test_nested_captures_each_get_theirs() -> None:
    net, one, two = Net(), x(), x()
    with wl.capture(net, hidden="layers.*") as outer:
        net(one)
        with wl.capture(net, hidden="layers.1") as inner:
            net(two)
    assert same(outer["hidden"], [*states(net, one), *states(net, two)])
    assert same(inner["hidden"], [states(net, two)[1]])
    assert [len(values) for values in outer.forwards("hidden")] == [3, 3]
    assert hooks_on(net) == 0


def test_captures_may_close_in_any_order() -> None:
    net = Net()
    first, second = wl.capture(net, hidden="layers.*"), wl.capture(net, hidden="layers.*")
    one, two = first.__enter__(), second.__enter__()
    net(x())
    first.__exit__(None, None, None)
    net(x())
    second.__exit__(None, None, None)
    assert (len(one["hidden"]), len(two["hidden"])) == (3, 6)
    assert hooks_on(net) == 0


def test_free_when_off() -> None:
    net = Net()
    kept = []
    handle = net.layers[0].register_forward_hook(lambda *_: kept.append(1))
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    with wl.capture(net, hidden="layers.*"):
        net(x())
        assert hooks_on(net) > 0
        handle.remove()
    assert hooks_on(net) == 0
    assert len(kept) == 1
    for name, module in net.named_modules():
        assert {k: id(v) for k, v in vars(module).items()} == {k: id(v) for k, v in before[name].items()}
    net.head = None
    with pytest.raises(TypeError) as error:
        net(x())
    assert not any("weightlift" in frame.filename for frame in traceback.extract_tb(error.value.__traceback__))


def test_the_users_hooks_stay_and_come_first() -> None:
    net = Net()
    net.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    value = x()
    with wl.capture(net, hidden="layers.0") as got:
        net(value)
    assert torch.equal(got["hidden"][0], net.layers[0](value, scale=0.5))


def test_a_captured_model_pickles_and_copies() -> None:
    net = Net()
    with wl.capture(net, hidden=wl.Output("layers.*", expect="maybe")):
        loaded = pickle.loads(pickle.dumps(net))
        buffer = io.BytesIO()
        torch.save(net, buffer)
        copied = copy.deepcopy(net)
    assert hooks_on(net) == 0
    for other in (loaded, copied):
        other(x())
        assert hooks_on(other) == 0, "a copy loses the hooks it was made with when it first runs"
    pickle.dumps(net)


def test_records_can_be_read_while_the_capture_is_open() -> None:
    net, value = Net(), x()
    with wl.capture(net, hidden="layers.*", last=wl.Output("layers.2", calls=[-1])) as got:
        net(value)
        assert len(got["hidden"]) == 3 and repr(got) == "Records(hidden: 3, last: 1)"
        net(value)
        assert len(got["hidden"]) == 6
    assert [len(forward) for forward in got.forwards("hidden")] == [3, 3]


class Again(nn.Module):
    """Calls itself; what fails within is caught."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, value: torch.Tensor, inner: str = "", fails: bool = False) -> torch.Tensor:
        for how in inner:
            with contextlib.suppress(ValueError):
                self(value + 1, fails=how == "f")
        out = self.layer(value)
        if fails:
            raise ValueError("as asked for")
        return out


def test_failed_forwards_are_told_from_those_that_run_within_others() -> None:
    net, value = Again(), x()
    with wl.capture(net, seen="layer") as got:
        net(value, "gfg")
        with pytest.raises(ValueError):
            net(value, "g", fails=True)
        net(value)
    # Two of the three within the first, and itself; what was within the one that failed later; the last one.
    assert same(got["seen"], [value + 1, value + 1, value, value + 1, value])
    assert [len(forward) for forward in got.forwards("seen")] == [1, 1, 1, 1, 1]


def test_a_failing_forward_leaves_nothing() -> None:
    net, value = Net(), x()
    with pytest.raises(RuntimeError), wl.capture(net, hidden="layers.*"):
        net(torch.zeros(1, 3))
    assert hooks_on(net) == 0
    with wl.capture(net, hidden="layers.*", inputs=wl.Input("layers.*")) as got:
        head, net.head = net.head, nn.Identity()
        net.head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net(value)
        net.head = head
        net(value)
    assert same(got["hidden"], states(net, value))
    assert len(got["inputs"]) == 3


def test_a_forward_that_calls_itself() -> None:
    class Chunked(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self(part) for part in x.split(1)]) if len(x) > 1 else super().forward(x)

    net, value = Chunked(), x(3)
    with wl.capture(net, hidden="layers.*") as got:
        net(value)
    assert len(got["hidden"]) == 9


def test_only_the_result_holds_tensors() -> None:
    net = Net()
    with wl.capture(net, hidden="layers.*") as got:
        net(x())
        inside = contextvars.copy_context()
    references = [weakref.ref(tensor) for tensor in got["hidden"]]
    assert all(reference() is not None for reference in references)
    gc.disable()
    try:
        del got
        assert all(reference() is None for reference in references), "without the garbage collector"
    finally:
        gc.enable()
    inside.run(net, x())


def test_other_threads_and_tasks_see_nothing() -> None:
    net = Net()
    with wl.capture(net, hidden="layers.*") as got:
        thread = threading.Thread(target=net, args=(x(),))
        thread.start()
        thread.join(60)
        net(x())
    assert len(got["hidden"]) == 3

    async def request(rows: int) -> None:
        value = x(rows)
        with wl.capture(net, hidden="layers.*") as mine:
            await asyncio.sleep(0)
            await asyncio.to_thread(net, value)
            await asyncio.sleep(0)
            net(value)
        assert same(mine["hidden"], states(net, value) * 2)

    async def both() -> None:
        await asyncio.gather(*(request(rows) for rows in range(1, 9)))

    asyncio.run(both())


def test_a_copied_context_carries_the_capture_on() -> None:
    net, value = Net(), x()
    with wl.capture(net, hidden="layers.*") as got:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(net, value))
        thread.start()
        thread.join(60)
    assert same(got["hidden"], states(net, value))


def test_a_context_that_outlives_the_capture_records_nothing() -> None:
    net = Net()
    with wl.capture(net, hidden="layers.*") as got:
        net(x())
        inside = contextvars.copy_context()
    with wl.capture(net, hidden="layers.*") as other:
        inside.run(net, x())
        net(x())
    assert len(got["hidden"]) == len(other["hidden"]) == 3


class Captures(nn.Module):
    """Captures its own layer while it runs, in this thread or in another, in a context of its own or a copy."""

    def __init__(self, inside: Callable[[Callable[[], object]], object]) -> None:
        super().__init__()
        self.layer = Layer()
        self.inside = inside
        self.got: list[torch.Tensor] = []

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        def watched() -> None:
            with wl.capture(self, mine="layer") as got:
                self.layer(value * 2)
            self.got.extend(got["mine"])

        value = self.layer(value)
        self.inside(watched)
        return self.layer(value)


@pytest.mark.parametrize("how", ["here", "copied", "thread"])
def test_a_capture_within_a_forward_that_is_captured(how: str) -> None:
    def in_thread(work: Callable[[], object]) -> None:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        thread.start()
        thread.join(60)

    ways = {"here": lambda work: work(), "copied": lambda work: contextvars.copy_context().run(work)}
    net, value = Captures(ways.get(how, in_thread)), x()
    with wl.capture(net, outer="layer") as got:
        net(value)
    layer = net.layer
    first = layer(value)
    assert same(got["outer"], [first, layer(first * 2), layer(first)])
    assert same(net.got, [layer(first * 2)])
    assert hooks_on(net) == 0


def test_a_context_copied_within_a_forward_holds_nothing_afterwards() -> None:
    net, contexts, seen = Net(), [], []
    net.layers[1].register_forward_hook(lambda *_: contexts.append(contextvars.copy_context()))
    net.layers[2].register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    with wl.capture(net, hidden="layers.*") as got:
        net(x())
    with wl.capture(net, hidden="layers.*") as other:
        contexts[0].run(net, x())
        net(x())
    assert len(got["hidden"]) == len(other["hidden"]) == 3
    del got, other
    assert len(seen) == 3 and not any(reference() is not None for reference in seen)


def test_what_comes_in_the_moment_of_closing_is_dropped() -> None:
    arrived, closed = threading.Event(), threading.Event()

    class Waits(torch.Tensor):
        def is_inference(self) -> bool:
            arrived.set()
            return not closed.wait(60)

    net, value = nn.Sequential(nn.Identity()), x().as_subclass(Waits)
    with wl.capture(net, seen=wl.Output("0", expect="maybe")) as got:
        worker = threading.Thread(target=contextvars.copy_context().run, args=(net, value))
        worker.start()
        assert arrived.wait(60)
    closed.set()
    worker.join(60)
    assert got["seen"] == ()
    reference = weakref.ref(value)
    del value, worker
    gc.collect()
    assert reference() is None


def test_a_generator_may_end_elsewhere() -> None:
    net = Net()

    def steps():
        with wl.capture(net, hidden="layers.*") as got:
            net(x())
            yield got

    generator = contextvars.copy_context().run(steps)
    contextvars.copy_context().run(next, generator)
    contextvars.copy_context().run(lambda: list(generator))
    assert hooks_on(net) == 0


def test_captures_that_were_closed_elsewhere_do_not_gather_in_a_context() -> None:
    """Each made every hook that ran in the context a little slower, for as long as that lived."""

    async def stream(net: Net) -> AsyncIterator[None]:
        with wl.capture(net, hidden=wl.Output("layers.*", expect="maybe")):
            yield

    async def serve() -> None:
        net = Net()
        for _ in range(4):
            steps = stream(net)
            await anext(steps)
            await asyncio.create_task(steps.aclose())
        with wl.capture(net, hidden="layers.*") as got:
            assert len(open_sessions.get()) == 1
            net(x())
        assert len(got["hidden"]) == 3

    asyncio.run(serve())


def test_the_steps_of_a_generator_in_contexts_of_their_own() -> None:
    """As a web server's thread pool runs them, which gives each step a copy of the context."""
    net = Net()

    def steps():
        with wl.capture(net, hidden="layers.*") as got:
            for _ in range(3):
                net(x())
                yield got

    generator = steps()
    with pytest.raises(wl.CaptureError, match="in a context that does not know of the capture"):
        while contextvars.copy_context().run(next, generator, None) is not None:
            pass
    assert hooks_on(net) == 0
    first = steps()
    contextvars.copy_context().run(next, first)
    contextvars.copy_context().run(net, x())  # somebody else's request
    assert first.close() is None
    generator, context = steps(), contextvars.copy_context()
    got = context.run(next, generator)
    assert len(context.run(list, generator)) == 2 and len(got["hidden"]) == 9


class Block:
    """A context manager of a user's own, around a capture."""

    def __init__(self, net: nn.Module) -> None:
        self.capture = wl.capture(net, hidden=wl.Output("layers.*", expect="maybe"))

    def __enter__(self) -> wl.Records:
        return self.capture.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.capture.__exit__(*error)


@contextlib.contextmanager
def watching(net: nn.Module) -> Iterator[wl.Records]:
    with Block(net) as got:
        yield got


@contextlib.contextmanager
def stacked(net: nn.Module) -> Iterator[wl.Records]:
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(watching(net))


WAYS = pytest.mark.parametrize("block", [Block, watching, stacked])


@WAYS
@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("another", [False, True])
def test_a_generator_whose_helper_has_the_block(block: Any, early: int, another: bool) -> None:
    """The block is in a frame that does not run any more when the model does: what went unseen was not told."""
    net = Net()

    def steps() -> Iterator[Any]:
        with block(net) as got:
            for _ in range(early):
                net(x())
            yield got
            with wl.capture(net, last="layers.2") if another else contextlib.nullcontext():
                net(x())
            yield got

    def delegating() -> Iterator[Any]:
        yield from steps()

    for make in (steps, delegating):
        with (
            concurrent.futures.ThreadPoolExecutor(3) as pool,
            pytest.raises(wl.CaptureError, match="in a context that does not know of the capture"),
        ):
            generator = make()
            while pool.submit(contextvars.copy_context().run, next, generator, None).result(60) is not None:
                pass
        assert hooks_on(net) == 0


@WAYS
def test_a_generator_whose_helper_has_the_block_and_sees_all(block: Any) -> None:
    """It ends elsewhere, or others run the model meanwhile, in a context of their own or below it on purpose."""
    net, value = Net(), x()

    def steps() -> Iterator[Any]:
        with block(net) as got:
            net(value)
            yield got

    def inside() -> Iterator[Any]:
        with block(net) as got:
            net(value)
            contextvars.Context().run(net, value)
        yield got

    for make in (steps, inside):
        generator = make()
        got = contextvars.copy_context().run(next, generator)
        contextvars.copy_context().run(net, value)
        assert contextvars.copy_context().run(list, generator) == [] and len(got["hidden"]) == 3
    generator, context = steps(), contextvars.copy_context()
    got = context.run(next, generator)
    assert context.run(list, generator) == [] and len(got["hidden"]) == 3 and hooks_on(net) == 0


def test_a_capture_that_is_dropped_while_open_leaves_nothing() -> None:
    net, value = Net(), x()
    dropped = wl.capture(net, hidden="layers.*")
    context = contextvars.copy_context()
    context.run(dropped.__enter__)
    assert hooks_on(net) > 0
    del dropped
    assert hooks_on(net) == 0
    context.run(net, value)
    dropped = wl.capture(net, hidden="layers.*")
    contextvars.copy_context().run(dropped.__enter__)
    with hooks._lock.own:  # the collector may come while this thread is at work on the hooks: the next one removes them
        del dropped
    assert hooks_on(net) > 0
    with wl.capture(net, hidden="layers.*") as got:
        net(value)
    assert same(got["hidden"], states(net, value))
    assert hooks_on(net) == 0 and not hooks._abandoned


def test_memory_is_flat() -> None:
    net, value = Net(), x()

    def captured() -> None:
        with wl.capture(net, hidden="layers.*", last=wl.Output("layers.*", tokens=-1, calls=(-1,))):
            net(value)

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    for _ in range(20):
        captured()
    before = objects()
    for _ in range(100):
        captured()
    assert objects() - before < 30


def test_early_calls_are_not_kept() -> None:
    net = Mixed()
    alive: list[weakref.ref[torch.Tensor]] = []
    net.often.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    with wl.capture(net, last=wl.Output("often", calls=(-1,))) as got, torch.no_grad():
        for _ in range(5):
            net(x())
        assert sum(reference() is not None for reference in alive) <= 2
    assert len(got["last"]) == 1


def test_a_capture_is_entered_once_at_a_time() -> None:
    net = Net()
    capture = wl.capture(net, hidden="layers.*")
    for _ in range(2):
        with capture as got:
            net(x())
            with pytest.raises(wl.CaptureError, match="open already"):
                capture.__enter__()
        assert len(got["hidden"]) == 3


def test_modules_that_share_a_submodule_and_other_models() -> None:
    """Layers shared by two models are recorded once a call, and another model's own layers are not."""
    one = Net(2)
    two = Net(3)
    two.layers[0] = one.layers[0]
    value = x()
    for net in (one, two, one):
        with wl.capture(net, hidden=Layer) as got:
            net(value)
        assert same(got["hidden"], states(net, value))
    with wl.capture(one, hidden=Layer) as got, wl.capture(two, hidden=Layer) as other:
        one(value)
        two(value)
    assert same(got.forwards("hidden")[0], states(one, value))
    assert same(other.forwards("hidden")[-1], states(two, value))
