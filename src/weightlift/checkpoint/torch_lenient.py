"""Read a torch pickle for one state dict in the midst of other things: a trainer's checkpoint.

Such pickles name classes that no state dict needs (arguments, schedulers, callbacks). Here an `Opaque` stands for each,
and for whatever would be made with it; it takes items and states, and forgets them. As in the strict reader nothing is
imported or called. What is opaque within the state dict that is wanted is refused there, by its key.
"""

from __future__ import annotations

import contextlib
from types import MappingProxyType
from typing import Any

from weightlift.checkpoint.torch_globals import (
    BrokenPickleError,
    ForbiddenGlobalError,
    Global,
    Opaque,
    StorageType,
    find,
    reduce,
)
from weightlift.checkpoint.torch_pickle import PickleReader

_FLAT = (str, int, float, bool, bytes, type(None))


def _code(name: str) -> Opaque:
    return Opaque(f"an object of {name}")


class LenientReader(PickleReader):
    """A `PickleReader` that passes over code."""

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
        except (BrokenPickleError, ValueError, TypeError, AttributeError):
            if isinstance(function, (Global, StorageType)):  # something known, made of what is not
                return _code(function.name if isinstance(function, Global) else "a storage")
            raise

    def _call_by_name(self, _: Any) -> None:
        self._stack.pop()  # arguments by name: nothing that is known takes any
        self._stack.pop()
        function = self._stack.pop()
        self._push(function if isinstance(function, Opaque) else _code("some class"))

    def _set_state(self, target: Any, state: Any) -> None:
        with contextlib.suppress(BrokenPickleError):  # attributes of a list, say
            super()._set_state(target, state)

    def _set_items(self, pairs: list[Any]) -> None:
        if type(self._stack[-1]) is not Opaque:
            known = [pair for pair in zip(pairs[::2], pairs[1::2]) if _is_known(pair[0])]
            super()._set_items([item for pair in known for item in pair])

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not Opaque:
            super()._extend([item for item in items if _is_known(item)] if type(target) is set else items)

    def _stored(self, pid: Any) -> Any:
        try:
            return super()._stored(pid)
        except ForbiddenGlobalError as error:
            return _code(str(error))

    def _frozen_set(self, _: Any) -> None:
        self._pop_mark()
        self._push(_code("builtins.frozenset"))

    def _drop(self, _: Any) -> None:
        self._stack.pop()

    def _drop_to_mark(self, _: Any) -> None:
        self._pop_mark()


def _is_known(key: Any) -> bool:
    """Whether a key is one that no code has to be run for."""
    return all(type(part) in _FLAT for part in (key if type(key) is tuple else (key,)))


LenientReader._handlers = MappingProxyType(
    {
        **PickleReader._handlers,
        "NEWOBJ_EX": LenientReader._call_by_name,
        "FROZENSET": LenientReader._frozen_set,
        "POP": LenientReader._drop,
        "POP_MARK": LenientReader._drop_to_mark,
    }
)
