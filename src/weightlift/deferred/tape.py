"""What a constructor did to deferred memory, and how to do it later.

Every storage that is born deferred has a `Record`; every call that would have written to it is a `Node`. A node names
the versions it read (the last node of each record at that time), so that the nodes form a graph of values, not of
names: a call that overwrites a storage whole depends on nothing that happened to it before, and dead work falls away
by itself, because nothing refers to it any more.

Values are produced in place, in the order in which the constructor made them. A node that overwrites what an earlier,
still unexecuted node has to read pulls that node in first (write after read).

The records and nodes hold no tensor and no storage of the user's: only the weak reference of the record to its buffer.
So ``param.data = other`` can't re-point a tape, and a storage that the user drops is gone; only memory that was written
to, and that a recorded call has still to read, outlives it.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import torch

from weightlift.deferred.reserve import Block, cut_again, give_back, open_range, unseal
from weightlift.lazy_views import shown, shown_as


class Record(weakref.ref):  # type: ignore[type-arg]
    """The history of one deferred storage: a weak reference to its buffer and the node that wrote it last.

    Without any node the storage holds zeros, which is also what ``torch.empty`` is taken to give.
    """

    __slots__ = (
        "at_once", "block", "key", "label", "last", "nbytes", "offset", "opened", "pieces", "pinned", "readers",
        "scratch",
    )  # fmt: skip

    key: int
    nbytes: int
    block: Block
    offset: int
    last: Node | None
    readers: Readers | None
    pinned: bool  # somebody else may hold the memory
    at_once: bool  # it is written piece by piece, and no longer waits for that: `weightlift.deferred.piecemeal`
    pieces: int
    opened: bool
    label: str | None
    scratch: memoryview | None

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def pending(self) -> bool:
        """True while recorded calls have not been run."""
        last = self.last
        return last is not None and not last.done

    def memory(self) -> memoryview:
        """The buffer, accessible; a scratch buffer once the user has dropped the storage."""
        buffer = self()
        if buffer is not None:
            if not self.opened:
                open_range(buffer, self.block, self.offset, self.known_readers().waiting)
                self.opened = True
            return buffer  # type: ignore[no-any-return]
        if self.scratch is None:
            block = Block(self.nbytes)
            unseal(block, 0, self.nbytes)
            self.scratch = block.view
        return self.scratch

    def known_readers(self) -> Readers:
        """The recorded calls that read it, to be added to."""
        if self.readers is None:
            self.readers = Readers()
        return self.readers

    def outlive(self) -> None:
        """The storage is gone. What was written there stays, if a recorded call has still to read it."""
        self.last = None  # which refers back; who has to read it knows the version
        if self.opened and self.readers is not None and self.readers.waiting():
            self.scratch = cut_again(self.block, self.offset, self.nbytes)

    def release_scratch(self) -> None:
        """Give the scratch memory of a dropped storage back, unless a recorded call has still to read it."""
        if self.scratch is not None and not live_readers(self):
            self.scratch = None

    def discard(self) -> None:
        """Give the memory back while the storage lives on: its values are not needed any more, and read as zeros.

        Does nothing while a recorded call has still to read it.
        """
        if self.opened and not live_readers(self):
            give_back(self.block, self.offset, self.nbytes)

    def flat(self, dtype: torch.dtype) -> torch.Tensor:
        """A plain tensor over the memory; no autograd, no user's storage object."""
        return torch.frombuffer(self.memory(), dtype=dtype, count=self.nbytes // dtype.itemsize)

    def tensor(self, ref: ViewRef) -> torch.Tensor:
        """As `flat`, with the geometry of ``ref``, and conjugated or negated where that is."""
        return shown_as(self.flat(ref.dtype).as_strided(ref.size, ref.stride, ref.offset), ref.lazily)


def new_record(
    buffer: memoryview, on_death: Callable[[Any], object], key: int, nbytes: int, block: Block, offset: int
) -> Record:
    """The record of a storage that was just made over ``buffer``, a part of ``block``, at the address ``key``."""
    # Every parameter of a model comes by here: a Python constructor would take as long as the rest of a birth.
    record = Record(buffer, on_death)
    record.key = key
    record.nbytes = nbytes
    record.block = block
    record.offset = offset
    record.opened = not (block.sealed or block.piecewise)
    record.pinned = record.at_once = False
    record.pieces = 0
    record.last = record.readers = record.label = record.scratch = None
    return record


def forget(records: dict[int, Record], record: Record) -> None:
    """The buffer of ``record`` is gone, and with it the storage, whose address can be used again; what recorded calls
    still read of it is kept."""
    records.pop(record.key, None)
    record.outlive()


class Readers:
    """Calls that have been recorded and read one storage, as long as somebody holds what they make."""

    __slots__ = ("_nodes",)

    def __init__(self) -> None:
        self._nodes: list[weakref.ref[Operation]] = []

    def add(self, node: Operation) -> None:
        """One more."""
        self._nodes.append(weakref.ref(node))

    def live(self) -> list[Operation]:
        """Those that have not been executed."""
        nodes = [node for ref in self._nodes if (node := ref()) is not None and not node.done]
        self._nodes = [weakref.ref(node) for node in nodes]
        return nodes

    def waiting(self) -> bool:
        """Whether there is one that has not been executed. May be asked by any thread, at any moment."""
        return any((node := ref()) is not None and not node.done for ref in tuple(self._nodes))


def live_readers(record: Record) -> list[Operation]:
    """The unexecuted calls, of results that somebody still holds, that have to read ``record``."""
    return record.readers.live() if record.readers is not None else []


class ViewRef:
    """A tensor argument of a recorded call: which storage, the geometry of the view, and whether it shows the memory's
    numbers conjugated (``tensor.conj()``) or negated (the ``imag`` of that)."""

    __slots__ = ("dtype", "lazily", "offset", "record", "size", "stride")

    def __init__(self, record: Record, tensor: torch.Tensor) -> None:
        self.record = record
        self.dtype = tensor.dtype
        self.size = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.lazily = shown(tensor)

    def covers(self) -> bool:
        """True when the view is the whole storage, every byte once, in whatever order."""
        size = self.size
        if size.numel() * self.dtype.itemsize != self.record.nbytes or self.offset != 0:
            return False
        expected = 1
        for extent, step in zip(reversed(size), reversed(self.stride)):
            if step != expected:
                break
            expected *= extent
        else:
            return True
        expected = 1
        for step, extent in sorted((step, extent) for step, extent in zip(self.stride, size) if extent != 1):
            if step != expected:
                return False
            expected *= extent
        return True

    def is_whole(self) -> bool:
        """True for a row-major view of the whole storage, as it is."""
        if any(self.lazily):
            return False
        expected = 1
        for extent, step in zip(reversed(self.size), reversed(self.stride)):
            if extent != 1 and step != expected:
                return False
            expected *= extent
        return self.offset == 0 and expected * self.dtype.itemsize == self.record.nbytes


class Node:
    """One recorded call. ``writes`` are the records that it gives values to, ``deps`` the versions that it reads."""

    __slots__ = ("done", "func", "random", "seed_label", "seq")

    seq: int
    func: Callable[..., Any]
    random: bool
    seed_label: str | None
    done: bool

    @property
    def writes(self) -> tuple[Record, ...]:
        """The records that it gives values to."""
        raise NotImplementedError

    @property
    def deps(self) -> tuple[tuple[Record, Node | None], ...]:
        """The versions that it reads: a record, and the node that wrote it last."""
        raise NotImplementedError

    @property
    def touched(self) -> tuple[Record, ...]:
        """Every record that the call reads or writes."""
        return (*self.writes, *(record for record, _ in self.deps))

    def execute(self, seed: int) -> None:
        """Run the call on the memory itself. Must be called outside every torch mode and without autograd."""
        generator = None
        if self.random:
            assert self.seed_label is not None
            generator = generator_for(seed, self.seed_label)
        self._call({} if generator is None else {"generator": generator})
        self.done = True

    def _call(self, generator: dict[str, torch.Generator]) -> None:
        raise NotImplementedError


class Fill(Node):
    """A call that gives the whole of a storage, in rows, its values out of nothing but ``values``: what nearly all
    initialisers are. An `Operation` could say the same with more objects, which the collector would have to look at.
    """

    __slots__ = ("dtype", "record", "size", "values")

    def __init__(
        self,
        seq: int,
        func: Callable[..., Any],
        record: Record,
        tensor: torch.Tensor,
        values: tuple[Any, ...],
        random: bool,
    ) -> None:
        self.seq = seq
        self.func = func
        self.random = random
        self.seed_label = None
        self.done = False
        self.record = record
        self.dtype = tensor.dtype
        self.size = tuple(tensor.shape)  # one thing less for the collector than a torch.Size
        self.values = values

    @property
    def writes(self) -> tuple[Record, ...]:
        """The one record."""
        return (self.record,)

    @property
    def deps(self) -> tuple[tuple[Record, Node | None], ...]:
        """None."""
        return ()

    def _call(self, generator: dict[str, torch.Generator]) -> None:
        self.func(self.record.flat(self.dtype).view(self.size), *self.values, **generator)


class Operation(Node):
    """Any call. ``outputs`` are where the results of an out-of-place call belong."""

    __slots__ = ("__weakref__", "_deps", "_writes", "args", "kwargs", "outputs")

    def __init__(
        self,
        seq: int,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        writes: tuple[Record, ...],
        deps: tuple[tuple[Record, Node | None], ...],
        outputs: tuple[ViewRef, ...] | None,
        random: bool,
    ) -> None:
        self.seq = seq
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self._writes = writes
        self._deps = deps
        self.outputs = outputs
        self.random = random
        self.seed_label = None
        self.done = False

    @property
    def writes(self) -> tuple[Record, ...]:
        """See `Node.writes`."""
        return self._writes

    @property
    def deps(self) -> tuple[tuple[Record, Node | None], ...]:
        """See `Node.deps`."""
        return self._deps

    def _call(self, generator: dict[str, torch.Generator]) -> None:
        kwargs = {name: _thaw(value) for name, value in self.kwargs.items()}
        results = self.func(*_thaw(self.args), **kwargs, **generator)
        if self.outputs is not None:
            for ref, result in zip(self.outputs, results if isinstance(results, (tuple, list)) else (results,)):
                ref.record.tensor(ref).copy_(result)
        # What the call needed is not needed any more: intermediate memory goes back at once.
        self.args, self.kwargs, self.outputs, self._deps = (), {}, None, ()


def frozen(
    value: Any, reads: dict[Record, Node | None], record_of: Callable[[torch.Tensor], Record | None]
) -> Any:
    """Replace tensors by references; note which versions are read. Memory from elsewhere is copied now."""
    if isinstance(value, torch.Tensor):
        record = record_of(value)
        if record is None:
            return value.detach().clone() if value.numel() else value.detach()
        if record.pinned:
            return value.detach().clone()
        reads[record] = record.last
        return ViewRef(record, value)
    if isinstance(value, dict):
        return {name: frozen(item, reads, record_of) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(frozen(item, reads, record_of) for item in value)
    return value


def _thaw(value: Any) -> Any:
    if type(value) is ViewRef:
        return value.record.tensor(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_thaw(item) for item in value)
    return value


def generator_for(seed: int, label: str) -> torch.Generator:
    """The CPU generator of one recorded sampling call: a function of the load's seed and the label alone (law 6)."""
    digest = hashlib.blake2b(f"{seed}\0{label}".encode(), digest_size=8).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest, "little"))
    return generator
