"""Nets, taps and programs made up at random: shared and repeated modules, recursion, failures, checkpointing, threads,
users' hooks, nested captures, changes of the structure.

Each program runs twice, on a net with captures and on its copy with plain hooks, put on last, whose records are made
by hand. Values, their order, names and gradients have to be the same, and what the net returns; and a capture has to
raise where the records by hand say that something is lacking.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import os
import pickle
import re
import threading
from collections import namedtuple
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as fields_of
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import weightlift as wl
from weightlift.errors import CaptureError

# The same few each time, or as many others as are asked for: thousands take minutes.
EXAMPLES = os.environ.get("WEIGHTLIFT_EXAMPLES")
SEARCH = settings(
    max_examples=int(EXAMPLES or 200),
    derandomize=EXAMPLES is None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
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
        return {key: apply(function, item) for key, item in value.items()}
    if isinstance(value, Data):
        return Data(apply(function, value.a), apply(function, value.b))
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
        def run(y: Any) -> Any:
            token = region.set("reentrant" if "reentrant" in (kind, region.get()) else kind)
            try:
                return value_of(child(y, depth))
            finally:
                region.reset(token)

        return checkpoint(run, y, use_reentrant=kind == "reentrant")

    def threaded(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(in_thread(child, y, depth))

    def carried(self, child: Any, y: Any, depth: int) -> Any:
        return value_of(in_thread(contextvars.copy_context().run, child, y, depth))

    def ungraded(self, child: Any, y: Any, depth: int) -> Any:
        with torch.no_grad():
            return value_of(child(y, depth))

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
    "reentrant", "threaded", "carried", "ungraded", "written", "mutated", "generated", "upwards", "watched",
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


# ---- taps


PATTERNS = ["", "*", "**", "c0", "c*", "*.*", "**.c1", "many.*", "c?.many.0", "**.many.*"]
PARTS: list[dict[str, Any]] = [
    {}, {}, {}, {"tokens": -1}, {"tokens": slice(1, None)}, {"tokens": [0, 2]}, {"at": (..., 0)}, {"at": 0},
]  # fmt: skip
INDICES: list[Any] = [None, None, None, 0, 1, -1, "a", "b", value_of]
ARGUMENTS: list[Any] = [0, 0, "x", 1, "depth", "scale", -1, lambda given: value_of(given[0] + (*given[1].values(),))]
CALLS = [None, None, None, [0], [-1], [0, -1], [1], [0, 2]]
EXPECTS = ["every", "every", "some", "maybe"]


def changed(value: Any) -> Any:
    return apply(lambda tensor: tensor * 1.5, value)


def is_even(fqn: str, module: nn.Module) -> bool:
    return len(fqn) % 2 == 0


@dataclass
class Choice:
    """A tap, as random numbers choose it; what it selects depends on the model."""

    numbers: tuple[int, ...]

    def select(self, model: nn.Module) -> Any:
        kind, which = self.numbers[0] % 8, self.numbers[1]
        modules = list(model.modules())
        if kind < 4:
            return PATTERNS[which % len(PATTERNS)]
        if kind == 4:
            return type(modules[which % len(modules)])
        if kind == 5:
            return modules[which % len(modules)]
        if kind == 6:
            return is_even
        return [PATTERNS[which % len(PATTERNS)], modules[which % len(modules)]]

    @property
    def before(self) -> bool:
        return self.numbers[2] % 3 == 0

    def options(self) -> dict[str, Any]:
        _, _, _, index, part, more, calls, expect = self.numbers
        options: dict[str, Any] = dict(PARTS[part % len(PARTS)])
        choices = ARGUMENTS if self.before else INDICES
        options["index"] = choices[index % len(choices)]
        options["calls"] = CALLS[calls % len(CALLS)]
        options["expect"] = EXPECTS[expect % len(EXPECTS)]
        options["detach"] = more % 5 == 1
        options["clone"] = [None, None, True, False][more % 4]
        options["dtype"] = torch.float64 if more % 7 == 3 else None
        options["replace"] = changed if more % 6 == 5 and not callable(options["index"]) else None
        if options["replace"] is not None and options["index"] not in ((0, "x") if self.before else (1, -1, "b")):
            options.pop("tokens", None), options.pop("at", None)  # of a container there is no part to edit
        options["stop"] = more % 11 == 4 and not any(call < 0 for call in options["calls"] or ())
        return options

    def tap(self, model: nn.Module) -> Any:
        return (wl.Input if self.before else wl.Output)(self.select(model), **self.options())


def selected(model: nn.Module, selector: Any) -> dict[str, nn.Module]:
    """By hand: names and modules."""
    if isinstance(selector, list):
        found: dict[str, nn.Module] = {}
        for part in selector:
            of_part = selected(model, part)
            if not of_part:
                return {}
            for name, module in of_part.items():
                if not any(module is other for other in found.values()):
                    found[name] = module
        return found
    if isinstance(selector, str):
        parts = [".*" if part == "**" else fnmatch_of(part) for part in selector.split(".")] if selector else []
        pattern = re.compile(r"\.".join(parts).replace(r".*\.", r"(?:.*\.)?") if parts else "")
        if selector == "**":
            pattern = re.compile(".*")
        named = [(name, module) for name, module in model.named_modules(remove_duplicate=False)
                 if pattern.fullmatch(name) and (name or not selector or selector == "**")]  # fmt: skip
        once: dict[int, tuple[str, nn.Module]] = {}
        for name, module in named:
            once.setdefault(id(module), (name, module))
        return dict(once.values())
    if isinstance(selector, nn.Module):
        return {name: module for name, module in model.named_modules() if module is selector}
    if isinstance(selector, type):
        return {name: module for name, module in model.named_modules() if isinstance(module, selector)}
    return {name: module for name, module in model.named_modules() if selector(name, module)}


def fnmatch_of(part: str) -> str:
    return part.replace("*", "[^.]*").replace("?", "[^.]")


# ---- records by hand


class Stop(BaseException):
    def __init__(self, owner: Any) -> None:
        self.owner = owner


class Lacks(LookupError):
    def __init__(self, none: bool) -> None:
        self.none = none


@dataclass
class Noted:
    tap: str
    fqn: str
    forward: int | None
    call: int
    kept: Any
    snapshot: Any
    versions: list[int]
    lack: Lacks | None = None


def element(output: Any, index: Any) -> Any:
    if index is None:
        return output
    if callable(index):
        value = index(output)
    elif isinstance(index, int):
        items = list(output.values()) if isinstance(output, dict) else output
        if not isinstance(items, list | tuple) or not -len(items) <= index < len(items):
            raise Lacks(False)
        value = items[index]
    elif isinstance(output, dict):
        if index not in output:
            raise Lacks(False)
        value = output[index]
    else:
        if not hasattr(output, index):
            raise Lacks(False)
        value = getattr(output, index)
    if value is None:
        raise Lacks(True)
    return value


def with_element(output: Any, index: Any, value: Any) -> Any:
    if index is None:
        return value
    if isinstance(output, Data):
        return Data(value, output.b) if index == "a" else Data(output.a, value)
    if isinstance(output, dict):
        key = list(output)[index] if isinstance(index, int) else index
        return {**output, key: value}
    if isinstance(output, Pair) and isinstance(index, str):
        return output._replace(**{index: value})
    items = list(output)
    items[index] = value
    return Pair(*items) if isinstance(output, Pair) else type(output)(items)


class ByHand:
    """What `weightlift.capture` should record and complain of."""

    def __init__(self, model: nn.Module, choices: dict[str, Choice]) -> None:
        self.model = model
        self.choices = choices
        self.chosen = {name: selected(model, choice.select(model)) for name, choice in choices.items()}
        self.options = {name: choice.options() for name, choice in choices.items()}
        self.noted: list[Noted] = []
        self.fired: dict[tuple[str, str], list[int | None]] = {}
        self.running: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar("running", default=())
        self.done: list[int] = []
        self.around: set[int] = set()
        self.numbers = 0
        self.stopped = False
        self.detached = self.edited = self.doubtful = False
        self.handles: list[Any] = []
        self.awaited = None
        if any(options["stop"] for options in self.options.values()):
            self.awaited = {
                (name, fqn): 1 if self.options[name]["calls"] is None else max(self.options[name]["calls"]) + 1
                for name, modules in self.chosen.items()
                for fqn in modules
            }

    def __enter__(self) -> ByHand:
        empty = [name for name, modules in self.chosen.items() if not modules]
        if empty:
            raise CaptureError("nothing", [])
        if any(o["stop"] for o in self.options.values()) and any(
            call < 0 for o in self.options.values() for call in o["calls"] or ()
        ):
            raise CaptureError("stop with the end", [])
        self.grad = torch.is_grad_enabled()
        for before in (True, False):
            for name, modules in self.chosen.items():
                if self.choices[name].before is before:
                    for fqn, module in modules.items():
                        self._hook(name, fqn, module, before)
        observers.set((*observers.get(), self))
        for other in observers.get():
            other.move_behind(self)
        return self

    def move_behind(self, latest: ByHand) -> None:
        """Where a capture is opened all captures come after the hooks that stand there by then."""
        for handle, before, module in self.handles:
            if module is latest.model or (before, id(module)) in {(b, id(m)) for _, b, m in latest.handles}:
                (module._forward_pre_hooks if before else module._forward_hooks).move_to_end(handle.id)

    def _hook(self, name: str, fqn: str, module: nn.Module, before: bool) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self not in observers.get():
                return None
            return self.argument(name, fqn, args, kwargs)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            if self not in observers.get():
                return None
            return self.output(name, fqn, output)

        if before:
            handle = module.register_forward_pre_hook(enter, with_kwargs=True)
        else:
            handle = module.register_forward_hook(leave)
        self.handles.append((handle, before, module))

    def argument(self, name: str, fqn: str, args: Any, kwargs: Any) -> Any:
        options, names = self.options[name], ["x", "depth"]
        index = options["index"]
        place: Any = index
        if isinstance(index, int):
            place = index + len(args) if index < 0 else index
            if not 0 <= place < len(args):
                place = names[place] if 0 <= place < 2 and names[place] in kwargs else place
                place = "scale" if place == 2 and "scale" in kwargs else place
                if isinstance(place, int):
                    place = None
        elif isinstance(index, str) and index not in kwargs:
            place = names.index(index) if index in names and names.index(index) < len(args) else None
        if place is None:
            self.note(name, fqn, lack=Lacks(False))
            return None
        value = index((args, kwargs)) if callable(index) else args[place] if isinstance(place, int) else kwargs[place]
        edited = None
        if options["replace"] is not None:
            self.edits()
            value = self.edit(options, value)
            if isinstance(place, int):
                edited = tuple(value if n == place else arg for n, arg in enumerate(args)), kwargs
            else:
                edited = args, {**kwargs, place: value}
        self.note(name, fqn, value)
        return edited

    def output(self, name: str, fqn: str, output: Any) -> Any:
        options = self.options[name]
        try:
            value = element(output, options["index"])
        except Lacks as lack:
            self.note(name, fqn, lack=lack)
            return None
        edited = None
        if options["replace"] is not None:
            self.edits()
            value = self.edit(options, value)
            edited = with_element(output, options["index"], value)
        self.note(name, fqn, value)
        return edited

    def edits(self) -> None:
        if self.grad and region.get():
            self.edited = True

    def edit(self, options: dict[str, Any], value: Any) -> Any:
        part = part_of(options)
        if part is None:
            return options["replace"](value)
        copied = value.clone()
        copied[part] = options["replace"](value[part])
        return copied

    def note(self, name: str, fqn: str, value: Any = None, lack: Lacks | None = None) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        options = self.options[name]
        calls = self.fired.setdefault((name, fqn), [])
        number = self.running.get()[-1] if self.running.get() else None
        if lack is None:
            value = apply(lambda tensor: finished(options, tensor), value)
            if self.grad and not options["detach"] and not torch.is_grad_enabled() and region.get() == "reentrant":
                self.detached = self.detached or bool(tensors_of(value))
                self.doubtful = True
        versions = [tensor._version for tensor in tensors_of(value) if not tensor.is_inference()]
        snapshot = apply(lambda tensor: tensor.detach().clone(), value)
        self.noted.append(Noted(name, fqn, number, len(calls), value, snapshot, versions, lack))
        calls.append(number)
        if self.awaited is not None and all(
            len(self.fired.get(key, ())) >= count for key, count in self.awaited.items()
        ):
            self.stopped = True
            raise Stop(self)

    # Told by the modules.

    def begins(self, module: nn.Module) -> None:
        if module is self.model:
            self.around.update(self.running.get())
            self.running.set((*self.running.get(), self.numbers))
            self.numbers += 1

    def ends(self, module: nn.Module) -> None:
        if module is self.model:
            *outer, number = self.running.get()
            self.running.set(tuple(outer))
            self.done.append(number)

    def fails(self, module: nn.Module, error: BaseException) -> None:
        if module is self.model and self.running.get():
            *outer, number = self.running.get()
            self.running.set(tuple(outer))
            if isinstance(error, Stop):
                self.stopped = True
                self.doubtful = self.doubtful or error.owner is not self  # it may have ended just before
                return
            self.noted = [noted for noted in self.noted if noted.forward != number]
            for calls in self.fired.values():
                calls[:] = [call for call in calls if call != number]

    def close(self) -> None:
        for handle, _, _ in self.handles:
            handle.remove()
        observers.set(tuple(other for other in observers.get() if other is not self))
        for name, options in self.options.items():
            if options["calls"] is None:
                continue
            counts = {fqn: len(self.fired.get((name, fqn), ())) for fqn in self.chosen[name]}
            self.noted = [
                noted
                for noted in self.noted
                if noted.tap != name
                or any(call == noted.call or call + counts[noted.fqn] == noted.call for call in options["calls"])
                or (noted.lack is not None and options["replace"] is not None)
            ]

    def wrong(self) -> set[str]:
        """What has to be complained of."""
        found = {"detached"} if self.detached else set()
        found |= {"edited"} if self.edited else set()
        for name, options in self.options.items():
            own = [noted for noted in self.noted if noted.tap == name]
            fired = {fqn: self.fired.get((name, fqn), []) for fqn in self.chosen[name]}
            allowed = options["expect"] == "maybe" or (
                options["expect"] == "some" and any(noted.lack is None for noted in own)
            )
            if any(noted.lack is not None and not (allowed and noted.lack.none) for noted in own):
                found.add("lacks")
            if options["expect"] == "maybe":
                continue
            if not any(fired.values()):
                found.add("fired")
            if options["expect"] == "every" and not self.stopped:
                for calls in fired.values():
                    within = {call for call in calls if call is not None}
                    missed = set(self.done) - self.around - within
                    if not calls or (within and missed):
                        found.add("fired")
            for calls in fired.values():
                if calls and any(not -len(calls) <= call < len(calls) for call in options["calls"] or ()):
                    found.add("calls")
        if any(not alike(noted.kept, noted.snapshot) for noted in self.noted if counts_writes(noted.kept)):
            found.add("written")
        return found

    def may_be_wrong(self) -> bool:
        return self.doubtful or any(
            [tensor._version for tensor in tensors_of(noted.kept) if not tensor.is_inference()] != noted.versions
            for noted in self.noted
        )


def counts_writes(value: Any) -> bool:
    return not any(tensor.is_inference() for tensor in tensors_of(value))


def part_of(options: dict[str, Any]) -> Any:
    if options.get("tokens") is not None:
        return (slice(None), options["tokens"])
    return options.get("at")


def finished(options: dict[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach() if options["detach"] else tensor
    part = part_of(options)
    if part is not None:
        tensor = tensor[part]
        tensor = tensor if options["clone"] is False else tensor.clone()
    if options["dtype"] is not None:
        tensor = tensor.to(options["dtype"])
    return tensor.clone() if options["clone"] else tensor


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, Data):
        return alike(one.a, other.a) and alike(one.b, other.b)
    return bool(one == other)


# ---- programs


@dataclass
class Result:
    """What came of one capture."""

    values: dict[str, tuple[Any, ...]]
    calls: dict[str, dict[str, tuple[Any, ...]]]
    forwards: dict[str, list[int]]
    error: CaptureError | None
    wrong: set[str]
    may_be_wrong: bool = False


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
        mode %= 8
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

        def edits(module: Any, args: Any, output: Any) -> Any:
            return apply(lambda tensor: tensor * 1.1, output)

        def shifts(module: Any, args: Any) -> Any:
            return (args[0] + 0.5, *args[1:]) if args else None

        def scales(module: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "scale": 2.0}

        def once(*given: Any) -> None:
            handle.remove()

        kind %= 9
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
        if how % 2 and not self.handles and isinstance(self, Watched):
            copied = pickle.loads(pickle.dumps(self.model))
        else:
            copied = copy.deepcopy(self.model)
        token = observers.set(())
        self._guarded(lambda: self.log.append(value_of(copied(self.base * 1)).detach().clone()))
        observers.reset(token)

    @contextlib.contextmanager
    def watching(self, module: nn.Module) -> Any:
        """A capture that a forward opens itself."""
        try:
            opened = self.start(module, {"inner": self.inner})
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
        return Result(values, calls, forwards, None, opened.wrong(), opened.may_be_wrong())


def gradients(side: Side) -> list[Any]:
    """Of what was returned last, by every tensor that was recorded."""
    recorded = [tensor for result in side.results for values in result.values.values() for value in values
                for tensor in tensors_of(value) if tensor.requires_grad]  # fmt: skip
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
    st.tuples(st.just("backward")),
    st.tuples(st.just("write")),
)
programs = st.tuples(st.lists(step, max_size=4), choice, st.lists(step, min_size=1, max_size=8)).map(
    lambda parts: [*parts[0], ("open", 1, parts[1]), *parts[2], ("forward", 1, 0, 1)]
)


@SEARCH
@given(nodes, programs, choice)
def test_a_capture_records_what_plain_hooks_do(nodes, program, inner):
    model = net_of(nodes)
    sides = [Watched(copy.deepcopy(model), inner, True), Hooked(copy.deepcopy(model), inner, True)]
    ours, theirs = sides
    dictionaries = [(vars(module), name, vars(module)[name]) for module in ours.made for name in DICTIONARIES]
    for side in sides:
        try:
            contextvars.copy_context().run(side.run, program)
        finally:
            for handle in side.handles:
                handle.remove()
    assert len(ours.log) == len(theirs.log)
    for one, other in zip(ours.log, theirs.log):
        assert alike(one, other), (one, other)
    assert len(ours.results) == len(theirs.results)
    for one, other in zip(ours.results, theirs.results):
        compare(one, other)
    assert alike(gradients(ours), gradients(theirs))
    assert all(owner[name] is dictionary for owner, name, dictionary in dictionaries)
    assert not any(vars(module)[name] for module in ours.made for name in DICTIONARIES)


def compare(found: Result, wanted: Result) -> None:
    for name, values in wanted.values.items():
        assert alike(found.values[name], values), (name, found.values[name], values)
        assert alike(found.calls[name], wanted.calls[name]), name
    assert found.forwards == wanted.forwards
    if wanted.wrong:
        assert found.error is not None, wanted.wrong
    elif found.error is not None:
        assert wanted.may_be_wrong, found.error


# ---- recorders


def edits(module: Any, args: Any, output: Any) -> Any:
    return apply(lambda tensor: tensor * 1.1, output)


def shifts(module: Any, args: Any) -> Any:
    return (args[0] + 0.5, *args[1:]) if args else None


def scales(module: Any, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "scale": 2.0}


CALM = ["plain", "plain", "keywords", "twice", "sometimes", "often", "direct", "method", "caught", "ungraded"]


def put_hook(model: nn.Module, number: int, kind: int) -> None:
    nodes = [module for module in model.modules() if isinstance(module, Stepwise)]
    node = nodes[number % len(nodes)]
    if kind % 4 == 1:
        node.register_forward_hook(edits)
    elif kind % 4 == 2:
        node.register_forward_pre_hook(shifts)
    elif kind % 4 == 3:
        node.register_forward_pre_hook(scales, with_kwargs=True)


def change(model: nn.Module, kind: int, number: int) -> None:
    """What a recorder has to follow."""
    nodes = [module for module in model.modules() if isinstance(module, Stepwise)]
    node = nodes[number % len(nodes)]
    names = [name for name in node._modules if name != "many"]
    kind %= 6
    if kind == 1 and names:
        node._modules[names[number % len(names)]] = Stepwise(20, number, False)
    elif kind == 2:
        add_step(node, Stepwise(21, number, False), "plain", 90, in_list=number % 2 == 1)
    elif kind == 3:
        model.train(not model.training)
    elif kind == 4:
        node.w.data = node.w.data * 3
    elif kind == 5:
        node.w = nn.Parameter(node.w.detach() * 2)


def by_hand(model: nn.Module, choices: dict[str, Choice], x: torch.Tensor, depth: int) -> tuple[Any, Any, set[str]]:
    """What a recorder should return: the output, the values, and what is wrong with them."""
    opened = ByHand(model, choices)
    token = observers.set(())
    output = None
    try:
        opened.__enter__()
        output = model(x, depth)
    except Stop:
        pass
    finally:
        opened.close()
        observers.reset(token)
    calls: dict[str, Any] = {name: {} for name in choices}
    for noted in opened.noted:
        if noted.lack is None:
            calls[noted.tap][noted.fqn] = (*calls[noted.tap].get(noted.fqn, ()), noted.kept)
    return output, calls, opened.wrong()


def check_record(record: Any, model: nn.Module, choices: dict[str, Choice], depth: int) -> None:
    x = torch.linspace(-1, 1, 2 * 3 * WIDTH).view(2, 3, WIDTH).requires_grad_()
    given = x * 1
    wanted, calls, wrong = by_hand(copy.deepcopy(model), choices, given, depth)
    try:
        output, got = record(given, depth)
        found = {name: got.calls(name) for name in choices}
    except CaptureError:
        assert wrong
        return
    assert not wrong, wrong
    assert alike(output, wanted)
    for name in choices:
        assert alike(found[name], calls[name]), name
        assert gradient_of(calls[name], x) == gradient_of(found[name], x)


def gradient_of(values: Any, x: torch.Tensor) -> Any:
    tensors = [tensor for tensor in tensors_of(list(values.values())) if tensor.requires_grad]
    if not tensors:
        return None
    return torch.autograd.grad(sum(tensor.sum() for tensor in tensors), x, retain_graph=True, allow_unused=True)[
        0
    ].tolist()


FEW = settings(SEARCH, max_examples=int(EXAMPLES or 120) // 20)


@FEW
@given(
    nodes,
    choice,
    choice,
    number,
    st.lists(st.tuples(number, number), max_size=2),
    number,
    number,
    st.sampled_from(["eager", "aot_eager"]),
)
def test_a_recorder_records_what_plain_hooks_do(nodes, first, second, depth, hooks, kind, which, backend):
    model = net_of(nodes, CALM, calm=True)
    for where, what in hooks:
        put_hook(model, where, what)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    depth %= 4
    records = []
    for choices in ({"t": first}, {"t": first, "u": second}):
        try:
            ByHand(model, choices).__enter__().close()
        except CaptureError:
            return
        record = wl.recorder(model, **{name: choice.tap(model) for name, choice in choices.items()})
        records.append((choices, record, torch.compile(record, backend=backend)))
    for changed_by in (0, kind):
        change(model, changed_by, which)
        for choices, record, compiled in records:
            for run in (record, compiled, compiled):
                check_record(run, model, choices, depth)
    assert not torch._dynamo.utils.counters["graph_break"]
    errors: list[BaseException] = []

    def work(choices: dict[str, Choice], compiled: Any) -> None:
        try:
            for _ in range(3):
                check_record(compiled, model, choices, depth)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(choices, compiled)) for choices, _, compiled in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
