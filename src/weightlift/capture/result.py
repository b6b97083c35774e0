"""What a capture gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from weightlift.capture.taps import Input, Output
from weightlift.capture.values import Lack
from weightlift.errors import CaptureError, Problem


class Entry:
    """One recorded value: which tap took it from which module, in which forward of the model."""

    __slots__ = ("call", "forward", "fqn", "tap", "value", "version")

    def __init__(self, tap: int, fqn: str, value: Any, forward: Any = None, version: Any = -1, call: int = 0) -> None:
        self.tap = tap
        self.fqn = fqn
        self.value = value
        self.forward = forward
        self.version = version
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy holds other tensors, of which no writes are known."""
        return Entry, (self.tap, self.fqn, self.value, self.forward, -1, self.call)


# What a twin records: the tap's number, the module's name, and the value. Without a name it is what the tap lacks.
Recorded: TypeAlias = "tuple[int, str | None, Any]"


class _Settles(Protocol):
    def settle(self, raw: Sequence[Recorded]) -> tuple[list[Entry], list[Problem]]: ...


class _Open(Protocol):
    raw: list[Any]
    forgotten: bool

    def settle_raw(self) -> None: ...


class Records(Mapping[str, tuple[Any, ...]]):
    """What was captured, by the names of the taps. It alone holds the tensors.

    ``got["hidden"]`` is a tuple in the order of the calls, over all forwards that ran while the capture was open. After
    the ``with`` block it does not change any more and can be shared among threads.
    """

    def __init__(
        self,
        names: Sequence[str],
        entries: list[Any],
        recorder: _Settles | None = None,
        session: _Open | None = None,
    ) -> None:
        self._session = session
        self._names = names
        self._raw = entries
        self._recorder = recorder
        self._settled: tuple[list[Entry], Sequence[Problem]] | None = None

    def __getitem__(self, name: str) -> tuple[Any, ...]:
        """The values of a tap, in call order.

        Raises:
            KeyError: there is no tap of that name.
            CaptureError: several sub-models recorded it; a recorder's tap did not fire.
        """
        entries = self._of(name)
        return tuple([entry.value for entry in entries])

    def named(self, name: str) -> dict[str, Any]:
        """The values of a tap by the names of their modules.

        Raises:
            CaptureError: a module was called more than once: see `calls`.
        """
        calls = self.calls(name)
        twice = [fqn for fqn, values in calls.items() if len(values) > 1]
        if twice:
            hint = f"got.calls({name!r}) gives every call; wl.Output(…, calls=[-1]) records the last one only"
            problems = [Problem(f"was called {len(calls[fqn])} times", fqn=fqn, hint=hint) for fqn in twice]
            raise CaptureError("there is no single value for each module", problems)
        return {fqn: values[0] for fqn, values in calls.items()}

    def calls(self, name: str) -> dict[str, tuple[Any, ...]]:
        """The values of a tap by the names of their modules, a tuple with one for each call."""
        result: dict[str, list[Any]] = {}
        for entry in self._of(name):
            result.setdefault(entry.fqn, []).append(entry.value)
        return {fqn: tuple(values) for fqn, values in result.items()}

    def forwards(self, name: str) -> tuple[tuple[Any, ...], ...]:
        """The values of a tap, a tuple for each forward that recorded some. Sub-models called directly count as one."""
        groups: dict[Any, list[Any]] = {}
        for entry in self._of(name):
            groups.setdefault(entry.forward, []).append(entry.value)
        return tuple(tuple(values) for values in groups.values())

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        counts = [0] * len(self._names)
        for entry in self._entries()[0]:
            counts[entry.tap] += 1
        return f"Records({', '.join(f'{name}: {count}' for name, count in zip(self._names, counts))})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle is the values alone, whatever recorded them."""
        if self._session is not None and not self._session.forgotten:
            raise TypeError("the capture is open and records on: leave its with block, then pickle or copy them")
        entries, problems = self._entries()
        return _settled, (tuple(self._names), entries, tuple(problems))

    def _of(self, name: str) -> list[Entry]:
        entries, problems = self._entries()
        if problems:
            raise CaptureError("the capture is not complete", problems)
        if name not in self._names:
            raise KeyError(f"no tap is called {name!r}; there are {', '.join(map(repr, self._names))}")
        if len(self._names) == 1:
            return entries
        number = self._names.index(name)
        return [entry for entry in entries if entry.tap == number]

    def _entries(self) -> tuple[list[Entry], Sequence[Problem]]:
        """A recorder's values are looked through when they are first read: not in compiled code."""
        if self._settled is not None:
            return self._settled
        if self._recorder is None:
            if self._session is not None and self._session.raw:  # the capture may still be open
                self._session.settle_raw()
            return self._raw, ()
        self._settled = self._recorder.settle(self._raw)
        return self._settled


def _settled(names: Sequence[str], entries: list[Entry], problems: Sequence[Problem]) -> Records:
    records = Records(names, entries)
    records._settled = entries, problems
    return records


def places(calls: Sequence[int], count: int) -> tuple[set[int], list[int]]:
    """The numbers of the calls that ``calls`` wants of ``count``, and those of ``calls`` that do not exist."""
    wanted = {call: call + count if call < 0 else call for call in calls}
    missing = [call for call, number in wanted.items() if not 0 <= number < count]
    return set(wanted.values()), missing


def no_such_calls(name: str, fqn: str, missing: Sequence[int], count: int) -> Problem:
    return Problem(
        f"tap {name!r} wants calls that were not made",
        fqn=fqn,
        expected=f"calls numbered {', '.join(map(str, missing))}",
        found=f"{count} call{'' if count == 1 else 's'}, numbered from 0" if count else "no call",
        hint='leave calls out, or give expect="maybe"',
    )


def let_go(name: str, fqn: str) -> Problem:
    what = f"tap {name!r} wants a call that was let go, as another forward ran around it or beside it that failed then"
    return Problem(what, fqn=fqn, hint="leave calls out, and choose from got.calls(…)")


def strayed() -> Problem:
    what = "the model ran within the block in a context that does not know of the capture, which recorded nothing of it"
    hint = (
        "a thread pool gives each step of a generator a context of its own: leave the block before a yield, or run"
        " every step in one context, context.run(next, …)"
    )
    return Problem(what, hint=hint)


def no_such_layers(key: str, fqn: str, missing: Sequence[int], count: int) -> Problem:
    return Problem(
        f"{key!r} has no such layers",
        fqn=fqn,
        expected=f"layers of {-count} to {count - 1}" if count else "none, as nothing was given",
        found=", ".join(map(str, missing)),
        hint='choose others, or give expect="maybe"',
    )


def lacking(name: str, tap: Output, fqn: str, lack: Lack) -> Problem:
    """A module did not give what a tap takes."""
    what = f"tap {name!r} takes an element that isn't there"
    hint = "choose another index, or leave it out for the whole output"
    if isinstance(tap, Input):
        what = f"tap {name!r} takes an argument that isn't passed"
        hint = "choose the position or the name of one that is"
    elif lack.none:
        what = f"tap {name!r} takes an element that is None"
        hint = "give expect='some' or 'maybe' if a module may leave it out"
        if "attn" in fqn.lower() or "attention" in fqn.lower():
            hint = f"{_NO_WEIGHTS}; else {hint}"
    return Problem(what, fqn=fqn, expected=f"index {tap.index!r}", found=lack.found, hint=hint)


def out_of_reach(name: str, fqn: str, kind: str, elements: Sequence[int | str]) -> Problem:
    """What is to be done with each tensor of a value cannot be done within an object. ``elements``: have none."""
    what = f"tap {name!r}: its options change nothing within a {kind}, which holds tensors that they should change"
    shown = " or ".join(f"index={element!r}" for element in elements[:_SHOWN]) or "index=…"
    hint = (
        f"take an element, {shown}, or what a callable makes of the whole (index=lambda output: output.clone(), or"
        " copy.deepcopy(output)), or leave the options out: they follow tuples, lists, mappings and dataclasses"
    )
    return Problem(what, fqn=fqn, hint=hint)


_SHOWN = 4  # of the elements of an output
_NO_WEIGHTS = (
    "attention that returns no weights needs attn_implementation='eager' in Transformers, need_weights=True in torch"
)


def undeclared(key: str, fqn: str, index: object, found: str) -> Problem:
    """A module does not give what the model's class says that it gives."""
    return Problem(
        f"{key!r}: the module gives other things than the model's class declares",
        fqn=fqn,
        expected=f"an argument, and of a tuple element {index!r}",
        found=found,
        hint="select modules and elements yourself: name=wl.Output(…, index=…)",
    )
