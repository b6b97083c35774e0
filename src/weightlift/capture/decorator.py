"""`records`: for authors of models, ``output_hidden_states=True`` and the like for a forward of their own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, TypeVar

from torch import nn
from torch.compiler import is_dynamo_compiling

from weightlift.capture.api import Capture
from weightlift.capture.recorder import Eager, Recording, refusals, run
from weightlift.capture.result import Entry
from weightlift.capture.taps import OWN_TAPS, Tap, collect_taps
from weightlift.capture.twin import with_own_code
from weightlift.errors import CaptureError
from weightlift.locks import Lock

_PLACE = "_weightlift_records"
Function = TypeVar("Function", bound=Callable[..., Any])


def records(**taps: Any) -> Callable[[Function], Function]:
    """Decorates the ``forward`` of a module class: each tap ``name`` adds a keyword ``output_name``.

    Args:
        taps: as for `capture`; selectors are looked up in the instance.

    A call with ``output_hidden_states=True`` captures that tap for its own duration, safely in any number of threads
    and under ``torch.compile``; a call without costs a look into its keywords. How the values are returned depends on
    what the forward returns: a mapping or a dataclass gets an entry or attribute ``hidden_states`` with a tuple of
    values; a tuple gets one more element for each, in the order of the taps; anything else, a tensor for instance, is
    returned in a tuple with them. A call raises `CaptureError` if the tap finds no module, or one that does not run.
    `capture` and `recorder` take the taps by their names, as what a Transformers class declares.

    In compiled code such a call runs on copies of the instance and of modules within it: plain attributes and hooks
    that are set later are seen when it is compiled anew, and what the forward sets on ``self`` stays with the copy.
    """
    known = collect_taps((), taps)

    def decorate(forward: Function) -> Function:
        def capturing(self: nn.Module, chosen: tuple[str, ...], args: Any, kwargs: Any) -> Any:
            with Capture(self, {name: known[name] for name in chosen}) as got:
                output = forward(self, *args, **kwargs)
            return attach(output, chosen, tuple([got[name] for name in chosen]))

        eager = Eager(capturing)
        prepare = _preparer(known, eager)
        own = f"{id(known)}"  # other methods, and classes derived from this, may have other taps of the same names

        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            chosen = tuple([name for name in known if kwargs.pop("output_" + name, False)])
            if not chosen:
                return forward(self, *args, **kwargs)
            if is_dynamo_compiling():
                name = " ".join((own, *chosen))
                prepare(self, name, chosen)
                place = self.__dict__[_PLACE]
                assert place.owner is self  # not what was compiled for another, if this is a shallow copy of that
                state: Recording = getattr(place, name)
                built = state.built
                output, recorded = run(state, built, built.pick(), forward, args, kwargs)
                entries, problems = built.expected.settle(recorded)
                if problems:
                    raise CaptureError("the capture is not complete", problems)
                return attach(output, chosen, gathered(chosen, entries))
            return eager.call(self, chosen, args, kwargs)

        decorated = functools.wraps(forward)(with_own_code(wrapper, getattr(forward, "__qualname__", "forward")))
        decorated.__signature__ = _with_flags(forward, known)  # type: ignore[attr-defined]
        setattr(decorated, OWN_TAPS, {**getattr(forward, OWN_TAPS, {}), **known})
        return decorated  # type: ignore[return-value]

    return decorate


def _with_flags(forward: Callable[..., Any], names: Iterable[str]) -> inspect.Signature:
    """What whoever asks for the arguments of a forward, as ``torch.export`` does, has to be told."""
    signature = inspect.signature(forward)
    given = [*signature.parameters.values()]
    rest = [given.pop()] if given and given[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    flags = ["output_" + name for name in names if "output_" + name not in signature.parameters]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False) for name in flags]
    return signature.replace(parameters=[*given, *added, *rest])


class _Place:
    """States for compiled calls, kept on the instance they are for. Copies and pickles of the instance start afresh.

    A shallow copy of the instance, and a twin is one, has the same: it needs one that is its own.
    """

    def __init__(self, owner: nn.Module | None = None) -> None:
        self.owner = owner

    def __reduce__(self) -> tuple[type[_Place], tuple[()]]:
        return _Place, ()


def _preparer(known: dict[str, Tap], eager: Eager) -> Callable[[nn.Module, str, tuple[str, ...]], bool]:
    lock = Lock()

    def prepare(module: nn.Module, name: str, chosen: tuple[str, ...]) -> bool:
        """Runs while a call is being traced: its state exists and fits the module from then on."""
        eager.keep_apart()
        with lock.own, refusals():
            place = module.__dict__.get(_PLACE)
            if place is None or place.owner is not module:
                place = module.__dict__[_PLACE] = _Place(module)
            state = getattr(place, name, None)
            if state is None:
                setattr(place, name, Recording(module, {tap: known[tap] for tap in chosen}))
            else:
                state.refresh()  # hooks and attributes may be others than when this was traced before
        return True

    # What torch.compiler.assume_constant_result sets; calling that here would import the compiler with every model.
    prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return prepare


def gathered(names: tuple[str, ...], entries: list[Entry]) -> tuple[tuple[Any, ...], ...]:
    """The values of each tap, from what a traced call recorded."""
    return tuple([tuple([entry.value for entry in entries if entry.tap == tap]) for tap in range(len(names))])


def attach(output: Any, names: tuple[str, ...], values: tuple[tuple[Any, ...], ...]) -> Any:
    """The output with what was recorded."""
    if type(output) is dict:
        return {**output, **dict(zip(names, values))}
    if isinstance(output, MutableMapping):
        for name, value in zip(names, values):
            output[name] = value
        return output
    if dataclasses.is_dataclass(output):
        for name, value in zip(names, values):
            object.__setattr__(output, name, value)
        return output
    if isinstance(output, tuple):
        return (*output, *values)
    return (output, *values)
