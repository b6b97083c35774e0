"""Programs made up at random, run with captures on the one side and with plain hooks on the other."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import pickle
import types
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from tests.property.made_nets import (
    GIVES,
    HOWS,
    WIDTH,
    Failed,
    Node,
    Odd,
    add_step,
    apply,
    driver,
    edits,
    in_thread,
    observers,
    scales,
    shifts,
    tensors_of,
    value_of,
)
from tests.property.taps_by_hand import ByHand, Choice, Stop, unwrapped
from torch import nn

import weightlift as wl
from weightlift.errors import CaptureError


@dataclass
class Result:
    """What came of one capture."""

    values: dict[str, tuple[Any, ...]]
    calls: dict[str, dict[str, tuple[Any, ...]]]
    forwards: dict[str, list[int]]
    error: CaptureError | None
    wrong: set[str]
    may_be_wrong: bool = False
    lost: bool = False


class Side:
    """Runs a program; its two kinds differ in how they capture."""

    def __init__(self, model: Node, inner: Choice, failures: bool) -> None:
        self.model = model
        self.inner = inner
        self.opened: list[tuple[Any, Any]] = []
        self.handles: list[Any] = []
        self.results: list[Result] = []
        self.log: list[Any] = []
        self.last: Any = None
        self.base = torch.linspace(-1, 1, 2 * 3 * WIDTH).view(2, 3, WIDTH).requires_grad_()
        self.failures = failures  # whether forwards may fail while captures are open
        self.made: list[nn.Module] = list(model.modules())

    def module(self, number: int) -> Any:
        nodes = [module for module in self.model.modules() if isinstance(module, Node)]
        return nodes[number % len(nodes)]

    def run(self, program: list[tuple[Any, ...]]) -> None:
        driver.set(self)
        for step, *numbers in program:
            getattr(self, step)(*numbers)
        while self.opened:
            self.close(-1)
        self.log.append([None if p.grad is None else p.grad.clone() for p in self.model.parameters()])

    def open(self, number: int, *choices: Choice) -> None:
        model = self.model if number % 3 else self.module(number // 3)
        try:
            self.opened.append(self.start(model, {f"t{n}": choice for n, choice in enumerate(choices)}))
        except CaptureError:
            self.log.append("nothing to capture")

    def close(self, which: int) -> None:
        if self.opened:
            self.results.append(self.finish(*self.opened.pop(which % len(self.opened)), None))

    def forward(self, depth: int, mode: int, which: int) -> None:
        self._guarded(lambda: self._forward(self.model if which % 3 else self.module(which // 3), depth % 4, mode))

    def _forward(self, module: Any, depth: int, mode: int) -> None:
        if depth == 3 and not self.failures:
            depth = 1
        x = self.base * 1
        mode %= 13
        if mode == 1:
            with torch.no_grad():
                self.last = module(x, depth)
        elif mode == 2:
            with torch.inference_mode():
                self.last = module(self.base * 1, depth)
        elif mode == 3:
            in_thread(module, x, depth)
        elif mode == 4:
            self.last = in_thread(contextvars.copy_context().run, module, x, depth)
        elif mode == 5:
            self.last = module(scale=0.5, x=x)
        elif mode == 6:
            with torch.autocast("cpu", torch.bfloat16):
                self.last = module(x, depth)
        elif mode == 7:
            changed = {name: weight * 1.5 for name, weight in module.named_parameters()}
            self.last = torch.func.functional_call(module, changed, (x, depth), tie_weights=False)
        elif mode == 8:
            self.last = torch.vmap(lambda x: value_of(module(x, depth)), randomness="different")(x)
        elif mode == 9:
            self.last = torch.func.grad(lambda x: value_of(module(x, depth)).sum())(self.base.detach())
        else:
            self.last = module(x, depth)
        self.log.append(("out", apply(lambda tensor: tensor.detach().clone(), self.last)))

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except (Failed, RuntimeError, TypeError, AttributeError, IndexError, KeyError, ValueError) as error:
            self.log.append(("raised", isinstance(error, Failed)))
        except BaseException as error:
            at = next((n for n, (opened, _) in enumerate(self.opened) if self.stops(opened, error)), None)
            if at is None:
                raise
            while len(self.opened) > at:
                result = self.finish(*self.opened.pop(), error)
                if len(self.opened) == at:
                    self.results.append(result)
            self.log.append("stopped")

    def gather(self, number: int, *choices: Choice) -> None:
        """Tasks of one event loop, each of which captures its own forward."""

        async def one(choice: Choice) -> None:
            with self.watching(self.model, choice):
                await asyncio.sleep(0)
                output = self.model(self.base * 1, number % 4 if self.failures else 1)
                self.log.append(value_of(output).detach().clone())
                await asyncio.sleep(0)

        async def all_of_them() -> None:
            await asyncio.gather(*map(one, choices))

        self._guarded(lambda: asyncio.run(all_of_them()))

    def backward(self) -> None:
        self._guarded(lambda: value_of(self.last).sum().backward())

    def write(self) -> None:
        if self.last is not None:
            with torch.no_grad():
                self._guarded(lambda: value_of(self.last).add_(1))

    def hook(self, number: int, kind: int) -> None:
        module = self.module(number)
        log = self.log

        def tells(*given: Any) -> None:
            if given[-1] is not None:
                log.append(value_of(given[-1]).detach().clone())

        def once(*given: Any) -> None:
            handle.remove()

        kind %= 8 if module.gives == len(GIVES) - 1 else 9  # torch's hooks for gradients fail on torch's own tuples
        if kind < 2:
            handle = module.register_forward_hook(edits, prepend=kind == 1)
        elif kind == 2:
            handle = module.register_forward_hook(tells, always_call=True)
        elif kind == 3:
            handle = module.register_forward_pre_hook(shifts)
        elif kind == 4:
            handle = module.register_forward_pre_hook(scales, with_kwargs=True)
        elif kind == 5:
            handle = module.register_forward_hook(once)
        elif kind == 6:
            handle = module.register_forward_hook(tells, with_kwargs=True)
        elif kind == 7:
            handle = nn.modules.module.register_module_forward_hook(
                lambda m, a, o: edits(m, a, o) if driver.get() is self and isinstance(m, Odd) else None
            )
        else:
            handle = module.register_full_backward_hook(lambda *_: log.append("backward"))
        self.handles.append(handle)

    def unhook(self, which: int) -> None:
        if self.handles:
            self.handles.pop(which % len(self.handles)).remove()

    def replace(self, number: int, which: int) -> None:
        parent = self.module(number)
        names = [name for name in parent._modules if name != "many"]
        if names:
            parent._modules[names[which % len(names)]] = self._fresh(which)

    def add(self, number: int, how: int) -> None:
        add_step(self.module(number), self._fresh(how), HOWS[how % 4], 90 + len(self.made), in_list=how % 2 == 1)

    def _fresh(self, number: int) -> Node:
        node = (Odd if number % 2 else Node)(20 + number, number, False)
        node.top = [self.model]
        self.made += node.modules()
        return node

    def delete(self, number: int) -> None:
        parent = self.module(number)
        if parent.steps and parent.steps[-1][1] in parent._modules:
            delattr(parent, parent.steps.pop()[1])

    def copied(self, how: int) -> None:
        """A copy runs, of which nothing is to be seen."""
        replaced = any("forward" in vars(module) for module in self.model.modules())
        if how % 2 and not self.handles and not replaced and isinstance(self, Watched):
            copied = pickle.loads(pickle.dumps(self.model))
        else:
            copied = copy.deepcopy(self.model)
        token = observers.set(())
        self._guarded(lambda: self.log.append(value_of(copied(self.base * 1)).detach().clone()))
        observers.reset(token)

    def shallow(self, number: int, elsewhere: int) -> None:
        """A copy that shares its dictionaries with the module runs, here or where nobody captures."""
        copied = copy.copy(self.module(number))
        run = in_thread if elsewhere % 2 else lambda module, x: module(x)
        self._guarded(lambda: self.log.append(value_of(run(copied, self.base * 1)).detach().clone()))

    def method(self, number: int, kind: int) -> None:
        """Another forward is set on the instance."""
        module = self.module(number)
        vars(module).pop("forward", None)
        if kind % 3:
            module.forward = types.MethodType(louder, module)

    def reclass(self, number: int) -> None:
        module = self.module(number)
        module.__class__ = Node if type(module) is Odd else Odd

    @contextlib.contextmanager
    def watching(self, module: nn.Module, choice: Choice | None = None) -> Any:
        """A capture of its own around what runs in it, for instance within a forward."""
        try:
            opened = self.start(module, {"inner": choice or self.inner})
        except CaptureError:
            opened = None
        try:
            yield
        except BaseException as error:
            if opened is None:
                raise
            stopped = self.stops(opened[0], error)
            result = self.finish(*opened, error)
            if not stopped:
                raise
            self.results.append(result)
        else:
            if opened is not None:
                self.results.append(self.finish(*opened, None))


def louder(self: Any, x: torch.Tensor, depth: int = 0, *, scale: float = 1.0) -> Any:
    return type(self).forward(self, x, depth, scale=scale * 2)


class Watched(Side):
    """By captures."""

    def start(self, model: nn.Module, choices: dict[str, Choice]) -> Any:
        opened = wl.capture(model, **{name: choice.tap(model) for name, choice in choices.items()})
        return opened, opened.__enter__()

    def stops(self, opened: Any, error: Any) -> bool:
        return opened._session is not None and opened._session is getattr(error, "session", None)

    def finish(self, opened: Any, got: Any, error: Any) -> Result:
        complaint = None
        try:
            opened.__exit__(*((None,) * 3 if error is None else (type(error), error, error.__traceback__)))
        except CaptureError as problem:
            complaint = problem
        forwards = {name: [len(group) for group in got.forwards(name)] for name in got}
        return Result(dict(got), {name: got.calls(name) for name in got}, forwards, complaint, set())


class Hooked(Side):
    """By hand."""

    def start(self, model: nn.Module, choices: dict[str, Choice]) -> Any:
        opened = ByHand(model, choices)
        return opened, opened.__enter__()

    def stops(self, opened: ByHand, error: Any) -> bool:
        return opened is getattr(error, "owner", None)

    def finish(self, opened: ByHand, _: Any, error: Any) -> Result:
        if isinstance(error, Stop):
            opened.stopped = True
        opened.close()
        values: dict[str, tuple[Any, ...]] = {}
        calls: dict[str, dict[str, tuple[Any, ...]]] = {}
        forwards: dict[str, list[int]] = {}
        for name in opened.choices:
            own = [noted for noted in opened.noted if noted.tap == name and noted.lack is None]
            values[name] = tuple(noted.kept for noted in own)
            calls[name] = {}
            groups: dict[Any, int] = {}
            for noted in own:
                calls[name][noted.fqn] = (*calls[name].get(noted.fqn, ()), noted.kept)
                groups[noted.forward] = groups.get(noted.forward, 0) + 1
            forwards[name] = list(groups.values())
        return Result(values, calls, forwards, None, opened.wrong(), opened.may_be_wrong(), opened.lost)


def gradients(side: Side) -> list[Any]:
    """Of what was returned last, by every tensor that was recorded."""
    recorded = [tensor for result in side.results for values in result.values.values() for value in values
                for tensor in tensors_of(value) if tensor.requires_grad and unwrapped(tensor) is tensor]  # fmt: skip
    try:
        total = value_of(side.last).sum()
        found = torch.autograd.grad(total, recorded, allow_unused=True, retain_graph=True)
    except (RuntimeError, IndexError) as error:
        return [type(error)]
    return [None if gradient is None else gradient.clone() for gradient in found]


number = st.integers(0, 60)
choice = st.tuples(*[number] * 8).map(Choice)
nodes = st.lists(
    st.tuples(number, st.booleans(), st.lists(st.tuples(number, number), max_size=3)), min_size=2, max_size=5
)
step = st.one_of(
    st.tuples(st.just("open"), number, choice),
    st.tuples(st.just("open"), number, choice, choice),
    st.tuples(st.just("close"), number),
    st.tuples(st.just("forward"), number, number, number),
    st.tuples(st.just("forward"), number, st.just(0), st.just(1)),
    st.tuples(st.just("hook"), number, number),
    st.tuples(st.just("unhook"), number),
    st.tuples(st.just("replace"), number, number),
    st.tuples(st.just("add"), number, number),
    st.tuples(st.just("delete"), number),
    st.tuples(st.just("copied"), number),
    st.tuples(st.just("gather"), number, choice, choice),
    st.tuples(st.just("shallow"), number, number),
    st.tuples(st.just("method"), number, number),
    st.tuples(st.just("reclass"), number),
    st.tuples(st.just("backward")),
    st.tuples(st.just("write")),
)
programs = st.tuples(st.lists(step, max_size=4), choice, st.lists(step, min_size=1, max_size=8)).map(
    lambda parts: [*parts[0], ("open", 1, parts[1]), *parts[2], ("forward", 1, 0, 1)]
)
