"""What to take: `Output`, `Input` and `Declared`, checked when they are made, for eager and compiled captures alike."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from weightlift.errors import CaptureError, Problem

Selector: TypeAlias = "str | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]"
Index: TypeAlias = "int | str | Callable[[Any], Any] | None"
Expect: TypeAlias = Literal["every", "some", "maybe"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is done with a value that was taken. The fields are described at `Output`."""

    tokens: int | slice | Sequence[int] | None = None
    at: Any = None
    detach: bool = False
    clone: bool | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    expect: Expect = "every"

    def __post_init__(self) -> None:
        tokens = self.tokens
        fits = tokens is None or isinstance(tokens, slice) or _is_number(tokens) or _is_numbers(tokens)
        self._require("tokens", fits, "a position, a slice or a list of positions")
        self._require("detach", isinstance(self.detach, bool), "True or False")
        self._require("clone", isinstance(self.clone, bool | None), "True, False or None")
        self._require("dtype", isinstance(self.dtype, torch.dtype | None), "a torch.dtype, as torch.float32")
        self._require("device", isinstance(self.device, torch.device | str | int | None), "a torch.device or its name")
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f"wl.{type(self).__name__}: device {self.device!r}: {error}") from None
        problems = []
        if self.tokens is not None and self.at is not None:
            problems.append(Problem("tokens and at both choose a part", hint="give one of them; at takes any index"))
        if self.expect not in ("every", "some", "maybe"):
            problems.append(Problem("expect", expected="'every', 'some' or 'maybe'", found=repr(self.expect)))
        if problems:
            raise CaptureError(f"this {type(self).__name__} can't be", problems)

    def _require(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            found = _shown(getattr(self, name))
            raise TypeError(f"wl.{type(self).__name__}: {name} must be {expected}; found {found}")

    @property
    def part(self) -> Any:
        """The indexing expression that ``tokens`` or ``at`` stand for; None when the whole is wanted."""
        if self.tokens is None:
            return self.at
        tokens: Any = self.tokens
        return (slice(None), list(tokens) if _is_numbers(tokens) else tokens)


@dataclass(frozen=True)
class Output(Options):
    """The output of modules.

    Args:
        select: which modules: a pattern of names (``*`` stands for one or part of one, ``**`` for any number of them),
            a class, a module, a predicate ``(fqn, module) -> bool``, or a list of these.
        index: an element of the output: a position, a key or attribute, or a callable. None takes it whole. An element
            that is None is an error, where ``expect`` does not say that a module may leave it out.
        calls: which calls of each module are kept, and edited, counted over the capture, as a list is indexed
            (``[0, -1]``). None: all.
        tokens: a position, slice or list of positions of dimension 1.
        at: any indexing expression, ``at=(slice(None), -1)``. What a slice leaves out is not kept in memory.
        detach, device: as the methods of tensors; they are applied to every tensor within tuples, lists, mappings and
            dataclasses. Other objects, as caches, stay what they are; it is an error if there was something to change.
        dtype: as of ``module.to``: integers and masks keep theirs, unless this is one for them.
        clone: True copies; None copies only what is a part of something larger; False never.
        stop: leave the forward once everything that the capture wants has been seen. The ``with`` block ends there.
        replace: ``fn(value) -> value``, edits in flight; with ``tokens`` or ``at`` it is given, and replaces, that
            part. As for torch's hooks, None leaves the value as it is. What can't stand there (a number for a tensor)
            is a TypeError within the forward. What is recorded is the edited value. What ``fn`` calls runs without
            this tap.
        expect: 'every' selected module must run in every forward, and give its element; 'some': at least one once;
            'maybe' none.

    Raises:
        CaptureError: options that contradict each other.
        TypeError: an option, or what selects modules, is of a wrong kind.
        ValueError: an empty list of selectors, or a device that torch does not know.
    """

    select: Selector | Sequence[Selector]
    index: Index = None
    calls: Sequence[int] | None = field(default=None, kw_only=True)
    stop: bool = field(default=False, kw_only=True)
    replace: Callable[[Any], Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_selector(f"wl.{type(self).__name__}", self.select)
        index: Any = self.index
        fits = isinstance(index, str | None) or _is_number(index) or callable(index)
        self._require("index", fits, "a position, a name or a callable")
        self._require("replace", self.replace is None or callable(self.replace), "a callable that takes the value")
        self._require("stop", isinstance(self.stop, bool), "True or False")
        if _is_number(index):
            object.__setattr__(self, "index", operator.index(index))
        problems = _not_numbers("calls", self.calls)
        if not problems and any(call < 0 for call in self.calls or ()):
            hint = "which call is the last is only known after the forward"
            for name, given in (("stop", self.stop), ("replace", self.replace is not None)):
                problems += [Problem(f"{name} with a negative call", hint=hint)] if given else []
        if self.replace is not None and callable(self.index):
            problems.append(Problem("replace with a callable index", hint="use a position, a key or no index"))
        if problems:
            raise CaptureError(f"this {type(self).__name__} can't be", problems)


@dataclass(frozen=True)
class Input(Output):
    """An argument of modules, before they run. ``index`` is its position (0 by default) or its name. It may be None.

    The other fields are those of `Output`.
    """

    index: Index = 0


@dataclass(frozen=True)
class Declared(Options):
    """What a model's class declares that it can record: ``"hidden_states"``, ``"attentions"`` of Transformers models.

    Args:
        key: the declared name; ``"encoder_attentions"`` and ``"vision_tower.attentions"`` name a sub-model's.
        layers: which of its values, as a tuple is indexed; the others are not kept. None: all. One that a forward does
            not give is an error, unless ``expect`` is 'maybe'.

    The other fields are those of `Output`, and so are the errors.
    """

    key: str
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("key", isinstance(self.key, str), "a declared name, as 'hidden_states'")
        problems = _not_numbers("layers", self.layers)
        if problems:
            raise CaptureError("this Declared can't be", problems)


def _is_numbers(value: Any) -> bool:
    """Several, not one."""
    return isinstance(value, Iterable) and not _is_number(value) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return hasattr(value, "__index__")  # numpy's numbers are no int


def _not_numbers(name: str, value: Any) -> list[Problem]:
    if value is None or (isinstance(value, Sequence) and len(value) and _is_numbers(value)):
        return []
    return [Problem(name, expected="a sequence of whole numbers", found=repr(value))]


def _require_selector(what: str, value: Any) -> None:
    """Raises TypeError, or ValueError for an empty list, which would record nothing and say nothing."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{what}: the list of selectors is empty; give at least one, or leave the tap out")
        for part in value:
            _require_selector(what, part)
    elif not (isinstance(value, str | type | nn.Module) or callable(value)):
        raise TypeError(f"{what}: expected {_SELECTORS}, or a list of these; found {_shown(value)}")


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def require_module(model: object) -> None:
    """Raises TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        hint = "; build it first" if isinstance(model, type) and issubclass(model, nn.Module) else ""
        raise TypeError(f"expected the torch.nn.Module whose forwards are captured, found {_shown(model)}{hint}")


Tap: TypeAlias = "Output | Declared"
_SELECTORS = "a pattern, a module class, a module, a predicate"
_NO_TAPS: Mapping[str, Tap] = {}
OWN_TAPS = "_weightlift_taps"  # the attribute of a forward that `records` decorated
_OPTIONS = frozenset(item.name for tap in (Output, Declared) for item in fields(tap)) - {"select", "key"}


def no_option(name: str, problem: Problem) -> Problem:
    """Of a tap that is called as an option is and selects nothing, that is said."""
    if name not in _OPTIONS:
        return problem
    return replace(problem, hint=f'{name} is an option of a tap: hidden=wl.Output("layers.*", {name}=…)')


def as_tap(value: object) -> Tap:
    """What a keyword argument of `capture` means: a tap, or a selector whose whole output is wanted."""
    if isinstance(value, Output | Declared):
        return value
    if isinstance(value, str | type | nn.Module | list | tuple) or callable(value):
        return Output(value)
    raise CaptureError(
        "nothing to capture",
        [
            Problem(
                "this is no selector",
                expected=f"{_SELECTORS}, wl.Output, wl.Input or wl.Declared",
                found=_shown(value),
            )
        ],
    )


def collect_taps(
    declared: Sequence[str | Declared], named: dict[str, Any], own: Mapping[str, Tap] = _NO_TAPS
) -> dict[str, Tap]:
    """Every tap by its name. ``own``: what the model's class gives names to, by `records`.

    Raises `CaptureError` when two have the same name, or when there are none.
    """
    taps: dict[str, Tap] = {}
    problems = []
    for item in declared:
        if isinstance(item, str) and item in own and item not in (*taps, *named):
            taps[item] = own[item]
            continue
        tap = Declared(item) if isinstance(item, str) else item
        if not isinstance(tap, Declared):
            what = "a positional argument is what a model's class declares"
            problems.append(Problem(what, found=_shown(item), hint="name it: hidden=…"))
        elif tap.key in taps or tap.key in named:
            problems.append(Problem(f"two taps are called {tap.key!r}", hint="give one of them another name"))
        else:
            taps[tap.key] = tap
    for name, value in named.items():
        try:
            taps.setdefault(name, as_tap(value))
        except CaptureError as error:
            problems.extend(no_option(name, problem) for problem in error.problems)
    for tap in (*declared, *named.values()):
        if isinstance(tap, Declared) and tap.key in own:
            what = f"{tap.key!r} is recorded by the class's own wl.records, which has its options there"
            problems.append(Problem(what, hint=f"give the name alone, {tap.key!r}, or select modules: wl.Output(…)"))
    if not taps and not problems:
        problems.append(Problem("no tap was given", hint='for instance hidden="model.layers.*"'))
    if problems:
        raise CaptureError("nothing was captured", problems)
    return taps
