"""Taps made up at random, and the records that plain hooks make for them, by hand."""

from __future__ import annotations

import contextvars
import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tests.property.made_nets import Data, Late, Out, Pair, apply, late, observers, region, tensors_of, value_of
from torch import nn

import weightlift as wl
from weightlift.errors import CaptureError

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
        if any(call < 0 for call in options["calls"] or ()):
            options["replace"] = None
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


class NoTensor(TypeError):
    """An edit of a part of what is no tensor."""


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
            raise Lacks(isinstance(output, Out) and hasattr(output, index))
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
        return (Out if isinstance(output, Out) else dict)(**{**output, key: value})
    if isinstance(output, Late):
        return late(value, output.b) if index == "a" else late(output.a, value)
    if isinstance(output, Pair) and isinstance(index, str):
        return output._replace(**{index: value})
    items = list(output)
    items[index] = value
    return Pair(*items) if isinstance(output, Pair) else type(output)(items)


opened: list[ByHand] = []


class ByHand:
    """What `weightlift.capture` should record and complain of."""

    def __init__(
        self, model: nn.Module, choices: dict[str, Choice], selectors: dict[str, Any] | None = None
    ) -> None:
        self.model = model
        self.choices = choices
        # Given where they were chosen before the model changed: what a number chooses may be another module by now.
        self.selectors = selectors or {name: choice.select(model) for name, choice in choices.items()}
        self.chosen = {name: selected(model, selector) for name, selector in self.selectors.items()}
        self.children = {module: len(module._modules) for module in model.modules()}
        self.kinds = {module: type(module) for module in model.modules()}
        self.added = False
        self.options = {name: choice.options() for name, choice in choices.items()}
        self.noted: list[Noted] = []
        self.fired: dict[tuple[str, str], list[int | None]] = {}
        self.running: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar("running", default=())
        self.done: list[int] = []
        self.around: set[int] = set()
        self.numbers = 0
        self.stopped = False
        self.detached = self.edited = self.doubtful = False
        self.refused = False  # whether an edit could not be made, which the model may have caught
        self.lost = False  # whether a wanted call may have been let go
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
        self.backward = torch._C._current_graph_task_id()  # that of the pass around it, if there is one
        for before in (True, False):
            for name, modules in self.chosen.items():
                if self.choices[name].before is before:
                    for fqn, module in modules.items():
                        self._hook(name, fqn, module, before)
        observers.set((*observers.get(), self))
        opened.append(self)  # in whatever task
        for other in opened:
            other.move_behind(self)
        return self

    def move_behind(self, latest: ByHand) -> None:
        """Where a capture is opened all captures come after the hooks that stand there by then."""
        for handle, before, module in self.handles:
            if module is latest.model or (before, id(module)) in {(b, id(m)) for _, b, m in latest.handles}:
                (module._forward_pre_hooks if before else module._forward_hooks).move_to_end(handle.id)

    def _hook(self, name: str, fqn: str, module: nn.Module, before: bool) -> None:
        def enter(caller: nn.Module, args: Any, kwargs: Any) -> Any:
            if self not in observers.get() or caller is not module:
                return None
            return self.argument(name, fqn, args, kwargs)

        def leave(caller: nn.Module, args: Any, output: Any) -> Any:
            if self not in observers.get() or caller is not module:
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
        if self.wants_edit(name, fqn):
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
        if self.wants_edit(name, fqn):
            self.edits()
            value = self.edit(options, value)
            edited = with_element(output, options["index"], value)
        self.note(name, fqn, value)
        return edited

    def recomputes(self) -> bool:
        """Whether a backward pass runs that has begun since this was opened: what runs in it counts as no call."""
        return torch._C._current_graph_task_id() not in (-1, self.backward)

    def wants_edit(self, name: str, fqn: str) -> bool:
        """Only the calls that are chosen, if any are."""
        calls = self.options[name]["calls"]
        chosen = calls is None or (not self.recomputes() and len(self.fired.get((name, fqn), ())) in calls)
        return chosen and self.options[name]["replace"] is not None

    def edits(self) -> None:
        if self.grad and region.get() == "idle":
            self.doubtful = True
        elif self.grad and region.get():
            self.edited = True

    def edit(self, options: dict[str, Any], value: Any) -> Any:
        part = part_of(options)
        if part is None:
            return options["replace"](value)
        if not isinstance(value, torch.Tensor):
            self.refused = True
            raise NoTensor("only a part of a tensor can be edited")
        copied = value.clone()
        copied[part] = options["replace"](value[part])
        return copied

    def note(self, name: str, fqn: str, value: Any = None, lack: Lacks | None = None) -> None:
        if self.recomputes():
            return
        options = self.options[name]
        calls = self.fired.setdefault((name, fqn), [])
        number = self.running.get()[-1] if self.running.get() else None
        if lack is None:
            if any(options.get(key) for key in ("detach", "clone", "dtype")) or part_of(options) is not None:
                # What that saves for the backward is not a checkpointed region's, which is recomputed without it.
                hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
                with torch.autograd.graph.saved_tensors_hooks(_same, _same) if hooked else nullcontext():
                    value = apply(lambda tensor: finished(options, tensor), value)  # else it is the container itself
            if self.grad and not options["detach"] and not torch.is_grad_enabled() and region.get():
                self.detached |= region.get() == "reentrant" and bool(tensors_of(value))
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
            self.renumber(number)
            for calls in self.fired.values():
                calls[:] = [call for call in calls if call != number]

    def renumber(self, number: int) -> None:
        for noted in self.noted:
            before = self.fired[noted.tap, noted.fqn][: noted.call].count(number)
            noted.call -= before
            self.lost |= bool(before) and self.options[noted.tap]["calls"] is not None
        for (name, _), calls in self.fired.items():  # and of what came before, later calls may have taken the place
            self.lost |= number in calls and self.options[name]["calls"] is not None and bool(set(calls) - {number})

    def close(self) -> None:
        for handle, _, _ in self.handles:
            handle.remove()
        opened.remove(self)
        observers.set(tuple(other for other in observers.get() if other is not self))
        self.look_for_more()
        for name, options in self.options.items():
            if options["calls"] is None:
                continue
            counts = {fqn: len(self.fired.get((name, fqn), ())) for fqn in self.chosen[name]}
            self.noted = [
                noted
                for noted in self.noted
                if noted.tap != name
                or any(noted.call == (call if call >= 0 else call + counts[noted.fqn]) for call in options["calls"])
            ]

    def look_for_more(self) -> None:
        """Modules that are meant by now and were not: to be told where some were only added, else they may be."""
        more = {
            fqn: module
            for name, selector in self.selectors.items()
            for fqn, module in selected(self.model, selector).items()
            if not any(module is other for other in self.chosen[name].values())
        }
        self.doubtful |= bool(more)
        fewer = any(len(module._modules) < count for module, count in self.children.items())
        for fqn, module in more.items():
            self.added |= type(module) is not self.kinds.get(module, type(module))
            parent = self.model.get_submodule(fqn.rpartition(".")[0])
            self.added |= not fewer and len(parent._modules) > self.children.get(parent, len(parent._modules))

    def wrong(self) -> set[str]:
        """What has to be complained of."""
        found = {"detached"} if self.detached else set()
        found |= {"added"} if self.added else set()
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
            # A forward that was stopped excuses no other.
            if options["expect"] == "every" and not (self.stopped and not set(self.done) - self.around):
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
            or not alike(noted.kept, noted.snapshot)
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


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that torch.func wrapped, what is inside."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        one, other = unwrapped(one), unwrapped(other)
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, Data | Late):
        return alike(vars(one), vars(other))
    return bool(one == other)
