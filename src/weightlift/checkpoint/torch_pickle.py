"""Read the pickle of a torch checkpoint without executing it.

What ``torch.load(weights_only=True)`` stands for, and stricter in how: nothing named in the pickle is ever imported
or called. Opcodes come from ``pickletools.genops``; names become inert records, and the few rebuild functions of the
weights-only list become records of what they would build: `TensorRef`, `Opaque` for tensors that have no plain bytes.
Any other global is an error, also one that a program has allowed with ``torch.serialization.add_safe_globals`` (in
`weightlift.checkpoint.torch_lenient` it is passed over). torch's own unpickler isn't used, since it builds what it
reads, and keeps a list of sparse tensors for the process.

Protocols 2 to 5 are read. No state is shared; safe in any thread.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import IO, Any

from weightlift.checkpoint.torch_globals import (
    BrokenPickleError,
    ForbiddenGlobalError,
    Opaque,
    StorageRef,
    StorageType,
    TensorRef,
    find,
    hashable,
    is_integer,
    reduce,
)

_MARK = object()
Handler = Callable[[Any, Any], None]  # of a reader and the argument of an opcode


class PickleReader:
    """Reads one pickle from a stream and leaves the stream behind it.

    After `read`, `attributes` tells what the pickle set on an OrderedDict (``_metadata`` of a state dict).
    """

    _handlers: Mapping[str, Handler]

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._attributes: dict[int, dict[str, Any]] = {}
        self._owners: list[Any] = []
        self.storages: dict[str, StorageRef] = {}

    def read(self, stream: IO[bytes]) -> Any:
        """The object, built of plain values and the records of this module.

        Raises `ForbiddenGlobalError` and `BrokenPickleError`.
        """
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    root = self._stack.pop()
                    if root is _MARK or self._stack:
                        raise BrokenPickleError("it ends before it is whole")
                    return root
                handler = self._handlers.get(opcode.name)
                if handler is None:
                    raise BrokenPickleError(f"the opcode {opcode.name}, which state dicts do not use")
                handler(self, argument)
        except (ForbiddenGlobalError, BrokenPickleError):
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, EOFError) as error:
            raise BrokenPickleError(f"{type(error).__name__}: {str(error)[:200]}") from error
        except (RecursionError, MemoryError) as error:
            raise BrokenPickleError("it is nested or sized beyond what any checkpoint is") from error
        raise BrokenPickleError("it has no end")

    def is_lossy(self, value: Any) -> bool:
        """Whether a container lacks something that was to go into it."""
        return False

    def attributes(self, value: Any) -> Mapping[str, Any]:
        """What the pickle set as attributes of ``value``, a mapping that `read` returned."""
        return self._attributes.get(id(value), {})

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_mark(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise BrokenPickleError("a mark is missing")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def _memoize(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _get(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def _tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) != count:
            raise BrokenPickleError("the stack is too short")
        self._stack[-count:] = [items]

    def _global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self._push(self._find(module, name))

    def _find(self, module: str, name: str) -> Any:
        return find(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise BrokenPickleError("a global whose name is not text")
        self._push(self._find(module, name))

    def _call(self, _: Any) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._push(self._reduced(function, args))

    def _reduced(self, function: Any, args: Any) -> Any:
        return reduce(function, args)

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        self._set_state(self._stack[-1], state)

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, OrderedDict) and isinstance(state, dict):
            self._owners.append(target)  # keeps its id from being given to another
            self._attributes.setdefault(id(target), {}).update(state)
        elif not isinstance(target, (TensorRef, Opaque)):  # attributes of a parameter are not weights
            raise BrokenPickleError(f"a state for {type(target).__name__}")

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict) or len(pairs) % 2:
            raise BrokenPickleError(f"items for {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[hashable(key)] = value

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            target.update(hashable(item) for item in items)
        else:
            raise BrokenPickleError(f"items for {type(target).__name__}")

    def _append(self, _: Any) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _text(self, argument: Any) -> None:
        # genops decodes Python 2 strings as latin-1; torch.load takes them for UTF-8.
        self._push(argument.encode("latin1").decode("utf-8"))

    def _persistent(self, _: Any) -> None:
        self._push(self._stored(self._stack.pop()))

    def _stored(self, pid: Any) -> Any:
        if type(pid) is not tuple or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            if type(pid) is tuple and pid and pid[0] == "module":
                raise ForbiddenGlobalError("a module with its source code")
            raise BrokenPickleError("a persistent id that is not a storage")
        _, kind, key, location, numel, *view = pid
        if type(location) is not str:
            raise BrokenPickleError("a storage whose device is not text")
        if not isinstance(kind, StorageType) or not (type(key) is str or is_integer(key)):
            raise BrokenPickleError("a storage that is not described")
        if not is_integer(numel) or numel < 0:
            raise BrokenPickleError("a storage that is not described")
        storage = self.storages.setdefault(str(key), StorageRef(str(key), kind.dtype, numel))
        if storage.dtype != kind.dtype or storage.numel != numel:
            raise BrokenPickleError(f"the storage {key} is described in two ways")
        if view and view[0] is not None:
            _, first, count = view[0]
            if not is_integer(first) or not is_integer(count) or not 0 <= first <= first + count <= numel:
                raise BrokenPickleError(f"a view of the storage {key} that is not within it")
            storage = StorageRef(storage.key, storage.dtype, numel, first)
        return storage


def _handlers() -> dict[str, Handler]:
    reader = PickleReader
    made: dict[str, Handler] = {
        "PROTO": lambda r, a: None,
        "FRAME": lambda r, a: None,
        "MARK": lambda r, a: r._push(_MARK),
        "NONE": lambda r, a: r._push(None),
        "NEWTRUE": lambda r, a: r._push(True),
        "NEWFALSE": lambda r, a: r._push(False),
        "EMPTY_TUPLE": lambda r, a: r._push(()),
        "EMPTY_LIST": lambda r, a: r._push([]),
        "EMPTY_DICT": lambda r, a: r._push({}),
        "EMPTY_SET": lambda r, a: r._push(set()),
        "TUPLE": lambda r, a: r._push(tuple(r._pop_mark())),
        "TUPLE1": lambda r, a: r._tuple(1),
        "TUPLE2": lambda r, a: r._tuple(2),
        "TUPLE3": lambda r, a: r._tuple(3),
        "APPEND": reader._append,
        "APPENDS": lambda r, a: r._extend(r._pop_mark()),
        "ADDITEMS": lambda r, a: r._extend(r._pop_mark()),
        "SETITEM": reader._set_item,
        "SETITEMS": lambda r, a: r._set_items(r._pop_mark()),
        "GLOBAL": reader._global,
        "STACK_GLOBAL": reader._stack_global,
        "REDUCE": reader._call,
        "NEWOBJ": reader._call,
        "BUILD": reader._build,
        "BINPERSID": reader._persistent,
        "SHORT_BINSTRING": reader._text,
        "BINSTRING": reader._text,
    }
    for name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
        made[name] = reader._memoize
    for name in ("BINGET", "LONG_BINGET"):
        made[name] = reader._get
    for name in (
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    ):  # fmt: skip
        made[name] = reader._push
    return made


PickleReader._handlers = MappingProxyType(_handlers())
