"""Read a torch pickle for one state dict in the midst of other things: a trainer's checkpoint.

Such pickles name classes that no state dict needs (arguments, schedulers, callbacks). Here an `Opaque` stands for each,
and for whatever would be made with it; it takes items and states, and forgets them. As in the strict reader nothing is
imported or called. What is opaque within the state dict that is wanted is refused there, by its key.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from weightlift.checkpoint.torch_globals import (
    BrokenPickleError,
    ForbiddenGlobalError,
    Global,
    Opaque,
    find,
    hint_for,
    reduce,
)
from weightlift.checkpoint.torch_pickle import Handler, PickleReader

_STORAGE = ("storage", b"storage")
_FLAT = (str, int, float, bool, bytes, type(None))


def _code(name: str) -> Opaque:
    return Opaque(f"an object of {name}", hint_for(name))


class LenientReader(PickleReader):
    """A `PickleReader` that passes over code."""

    def __init__(self) -> None:
        super().__init__()
        self._lossy: dict[int, Any] = {}  # by its id, which the container itself keeps from being another's

    def is_lossy(self, value: Any) -> bool:
        """Whether a container was to have keys or items that only code can make, or a state."""
        return id(value) in self._lossy

    def _find(self, module: str, name: str) -> Any:
        try:
            return find(module, name)
        except ForbiddenGlobalError as error:
            return _code(str(error))

    def _reduced(self, function: Any, args: Any) -> Any:
        if isinstance(function, Opaque):
            return function
        try:
            return reduce(function, args)
        except (BrokenPickleError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
            if not isinstance(function, Global):
                raise
            if "_rebuild_" in function.name:
                hints = [item.hint for item in args if isinstance(item, Opaque)] if type(args) is tuple else []
                return Opaque(f"a tensor that can't be told: {str(error)[:200]}", next(filter(None, hints), None))
            return _code(function.name)  # something known, made of what is not

    def _call_by_name(self, _: Any) -> None:
        self._stack.pop()  # arguments by name: nothing that is known takes any
        self._stack.pop()
        function = self._stack.pop()
        self._push(function if isinstance(function, Opaque) else _code("some class"))

    def _instance(self, argument: Any) -> None:
        made = self._pop_mark()
        if argument is not None:
            self._push(_code(str(argument).replace(" ", ".")[:200]))
        else:
            self._push(made[0] if made and isinstance(made[0], Opaque) else _code("some class"))

    def _set_state(self, target: Any, state: Any) -> None:
        try:
            super()._set_state(target, state)
        except BrokenPickleError:
            self._lossy[id(target)] = target

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Opaque:
            return
        known = [pair for pair in zip(pairs[::2], pairs[1::2]) if _is_known(pair[0])]
        if 2 * len(known) < len(pairs):
            self._lossy[id(target)] = target
        super()._set_items([item for pair in known for item in pair])

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Opaque:
            return
        known = [item for item in items if _is_known(item)] if type(target) is set else items
        if len(known) < len(items):
            self._lossy[id(target)] = target
        super()._extend(known)

    def _text(self, argument: Any) -> None:
        data = argument.encode("latin1")
        try:
            self._push(data.decode("utf-8"))
        except UnicodeDecodeError:
            self._push(data)  # Python 2 had one type for both

    def _stored(self, pid: Any) -> Any:
        kind = pid[1] if type(pid) is tuple and len(pid) > 1 and pid[0] in _STORAGE else None
        if kind is None or isinstance(kind, Opaque):
            return _code("something kept elsewhere") if kind is None else kind
        return super()._stored(pid)

    def _frozen_set(self, _: Any) -> None:
        self._pop_mark()
        self._push(_code("builtins.frozenset"))

    def _repeat(self, _: Any) -> None:
        self._push(self._stack[-1])

    def _extension(self, _: Any) -> None:
        self._push(_code("a registered extension"))

    def _drop(self, _: Any) -> None:
        self._stack.pop()

    def _drop_to_mark(self, _: Any) -> None:
        self._pop_mark()


def _is_known(key: Any) -> bool:
    """Whether a key is one that no code has to be run for."""
    return all(type(part) in _FLAT for part in (key if type(key) is tuple else (key,)))


def _handlers() -> dict[str, Handler]:
    reader = LenientReader
    own: dict[str, Handler] = {
        "NEWOBJ_EX": reader._call_by_name, "OBJ": reader._instance, "INST": reader._instance,
        "FROZENSET": reader._frozen_set, "DUP": reader._repeat, "POP": reader._drop, "POP_MARK": reader._drop_to_mark,
        "EXT1": reader._extension, "EXT2": reader._extension, "EXT4": reader._extension,
        "SHORT_BINSTRING": reader._text, "BINSTRING": reader._text,
    }  # fmt: skip
    return {**PickleReader._handlers, **own}


LenientReader._handlers = MappingProxyType(_handlers())
