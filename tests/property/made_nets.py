"""Nets made up at random: modules that call their children in many ways, fail, share, recur, checkpoint."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import namedtuple
from dataclasses import dataclass, field, is_dataclass
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

WIDTH = 4
DICTIONARIES = [
    kind + rest
    for kind in ("_forward_hooks", "_forward_pre_hooks")
    for rest in ("", "_with_kwargs")
] + ["_forward_hooks_always_called"]  # fmt: skip


class Failed(Exception):
    pass


@dataclass
class Data:
    a: Any
    b: Any = None


@dataclass
class Late:
    """Its constructor takes only some of what it holds, and counts how often it ran."""

    a: Any
    b: Any = field(init=False, default=None)
    made: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.made += 1


@dataclass
class Out(ModelOutput):
    a: Any = None
    b: Any = None


def late(a: Any, b: Any) -> Late:
    made = Late(a)
    made.b = b
    return made


Pair = namedtuple("Pair", "a b")
GIVES = [
    lambda x, y: y,
    lambda x, y: x,
    lambda x, y: (y, y * 2),
    lambda x, y: [y, y + 1],
    lambda x, y: {"a": y, "b": y * 2},
    lambda x, y: Data(y),
    lambda x, y: Pair(y, x),
    lambda x, y: {"a": (y, [y * 3]), "b": None},
    lambda x, y: (y, None),
    lambda x, y: y,
    late,
    lambda x, y: Out(y),
    lambda x, y: {"a": Out(y, (x, Data(y * 2))), "b": [late(y, x)]},
    lambda x, y: torch.return_types.max((y, x)),
]
# Who has to be told of the calls of modules, and whom forwards that open captures themselves ask for one.
observers: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("observers", default=())
driver: contextvars.ContextVar[Any] = contextvars.ContextVar("driver", default=None)
region: contextvars.ContextVar[str] = contextvars.ContextVar("region", default="")


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields_of(value)]
    return [item for part in value for item in tensors_of(part)] if isinstance(value, list | tuple) else []


def value_of(output: Any) -> Any:
    """The first tensor in what a module returned."""
    return tensors_of(output)[0]


def apply(function: Any, value: Any) -> Any:
    """To every tensor in a value."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Pair):
        return Pair(*[apply(function, item) for item in value])
    if isinstance(value, list | tuple):
        return type(value)([apply(function, item) for item in value])
    if isinstance(value, dict):
        changed = {key: apply(function, item) for key, item in value.items()}
        return Out(**changed) if isinstance(value, Out) else changed
    if isinstance(value, Data | Late):
        return (Data if isinstance(value, Data) else late)(apply(function, value.a), apply(function, value.b))
    return value


def in_thread(function: Any, *args: Any) -> Any:
    result: list[Any] = []
    grad = torch.is_grad_enabled()

    def work() -> None:
        with torch.set_grad_enabled(grad):
            try:
                result.append((function(*args), None))
            except BaseException as error:  # raised again where it belongs
                result.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


class Stepwise(nn.Module):
    """Does what its steps say. ``depth`` says how the call goes: 3 fails where a node is fragile."""

    def __init__(self, number: int, gives: int, fragile: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH) + number / 8)
        self.gives = gives % len(GIVES)
        self.fragile = fragile
        self.steps: list[tuple[str, str]] = []
        self.top: list[nn.Module] = []
        self.many = nn.ModuleList()

    def forward(self, x: torch.Tensor, depth: int = 0, *, scale: float = 1.0) -> Any:
        y = x * self.w * scale
        for how, name in self.steps:
            child = self.get_submodule(name) if name else self.top[0]
            y = getattr(self, how)(child, y, depth)
        if self.fragile and depth == 3:
            raise Failed
        return GIVES[self.gives](x, y)

    def other(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w

    def plain(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(child(y, depth))

    def keywords(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(child(scale=0.5, depth=depth, x=y))

    def twice(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(child(value_of(child(y, depth)), depth))

    def sometimes(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(child(y, depth)) if depth % 2 else y

    def often(self, child: Any, y: Any, depth: int) -> Any:
        for _ in range(depth % 4):
            y = value_of(child(y, depth=depth))
        return y

    def direct(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(child.forward(y, depth))

    def method(self, child: Any, y: Any, depth: int) -> Any:
        return child.other(y)

    def caught(self, child: Any, y: Any, depth: int) -> Any:
        try:
            return value_of(child(y, depth))
        except Failed:
            return y + 1

    def checkpointed(self, child: Any, y: Any, depth: int) -> Any:
        return self._region(child, y, depth, "other")

    def reentrant(self, child: Any, y: Any, depth: int) -> Any:
        return self._region(child, y, depth, "reentrant")

    def _region(self, child: Any, y: Any, depth: int, kind: str) -> Any:
        around, reentrant = region.get(), kind == "reentrant"
        if not torch.is_grad_enabled() and around != "reentrant":
            kind = around or "idle"  # nothing is cut off, and nothing computed again

        def run(y: Any) -> Any:
            token = region.set("reentrant" if "reentrant" in (kind, around) else kind)
            try:
                return value_of(child(y, depth))
            finally:
                region.reset(token)

        return checkpoint(run, y, use_reentrant=reentrant)

    def threaded(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(in_thread(child, y, depth))

    def carried(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(in_thread(contextvars.copy_context().run, child, y, depth))

    def ungraded(self, child: Any, y: Any, depth: int) -> Any:
        with torch.no_grad():
            return value_of(child(y, depth))

    def inferred(self, child: Any, y: Any, depth: int) -> Any:
        with torch.inference_mode():
            y = value_of(child(y, depth))
        return y.clone()

    def linear(self, child: Any, y: Any, depth: int) -> Any:
        """Under autocast of another dtype."""
        return value_of(child(nn.functional.linear(y, torch.eye(WIDTH) * 1.5), depth))

    def again(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(self(value_of(child(y, depth)), depth + 4)) if depth < 4 else y

    def tasks(self, child: Any, y: Any, depth: int) -> Any:
        async def one() -> Any:
            await asyncio.sleep(0)
            return value_of(child(y, depth))

        async def both() -> Any:
            return sum(await asyncio.gather(one(), one()))

        if asyncio._get_running_loop() is not None:
            return value_of(child(y, depth))
        return asyncio.run(both())

    def written(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(child(y, depth)).add_(1)

    def mutated(self, child: Any, y: Any, depth: int) -> Any:
        output = child(y, depth)
        y = value_of(output) * 2
        if isinstance(output, list):
            output.append(y)
        elif isinstance(output, dict):
            output["c"] = y
        elif isinstance(output, tuple) and isinstance(output[1], torch.Tensor):
            output[1].mul_(2)
        return y

    def generated(self, child: Any, y: Any, depth: int) -> Any:
        return sum([value_of(output) for output in (child(y, depth) for _ in range(2))])

    def upwards(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(self.top[0](y, depth + 4)) if depth < 4 else y

    def watched(self, child: Any, y: Any, depth: int) -> Any:
        if depth >= 4:
            return y
        if driver.get() is None:
            return self.plain(child, y, depth)
        with driver.get().watching(child):
            return value_of(child(y, depth))
        return y


class Node(Stepwise):
    """Tells of its calls."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        told = observers.get() if torch._C._current_graph_task_id() == -1 else ()
        for observer in told:
            observer.begins(self)
        try:
            output = super().__call__(*args, **kwargs)
        except BaseException as error:
            for observer in reversed(told):
                observer.fails(self, error)
            raise
        for observer in reversed(told):
            observer.ends(self)
        return output


class Odd(Node):
    pass


class OddCalm(Stepwise):
    pass


HOWS = [
    "plain", "plain", "keywords", "twice", "sometimes", "often", "direct", "method", "caught", "caught", "checkpointed",
    "reentrant", "threaded", "carried", "ungraded", "written", "mutated", "generated", "upwards", "watched", "inferred",
    "linear", "again", "tasks",
]  # fmt: skip


def net_of(nodes: list[tuple[int, bool, list[tuple[int, int]]]], hows: list[str] = HOWS, *, calm: bool = False) -> Any:
    """Node 0 is the root; the others are children of earlier ones, in several places some of them."""
    kinds: Any = (Stepwise, OddCalm) if calm else (Node, Odd)
    made = [kinds[n % 3 == 2](n, gives, fragile and not calm) for n, (gives, fragile, _) in enumerate(nodes)]
    for number, (node, (_, _, calls)) in enumerate(zip(made, nodes)):
        node.top = [made[0]]
        for place, (how, to) in enumerate(calls):
            later = made[number + 1 :]
            if hows[how % len(hows)] == "upwards":
                node.steps.append(("upwards", ""))
            elif later:
                add_step(node, later[to % len(later)], hows[how % len(hows)], place, in_list=to % 3 == 2)
    return made[0]


def add_step(node: Stepwise, child: nn.Module, how: str, place: int, *, in_list: bool) -> None:
    if in_list:
        node.many.append(child)
        node.steps.append((how, f"many.{len(node.many) - 1}"))
    else:
        node.add_module(f"c{place}", child)
        node.steps.append((how, f"c{place}"))


# -- what users' hooks do


def edits(module: Any, args: Any, output: Any) -> Any:
    return apply(lambda tensor: tensor * 1.1, output)


def shifts(module: Any, args: Any) -> Any:
    return (args[0] + 0.5, *args[1:]) if args else None


def scales(module: Any, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "scale": 2.0}
