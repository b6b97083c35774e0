"""The torch mode that sees a constructor's calls and puts them off.

`Recorder` is a ``TorchDispatchMode``: it gets every ATen call of its own thread. What bypasses ATen is seen by
`weightlift.deferred.functions`. Neither patches anything; both end with the scope.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightlift.ambient import lazy_views_as_they_are
from weightlift.deferred import batch_norm
from weightlift.deferred.calls import (
    BIRTHS,
    DTYPES,
    KINDS,
    Birth,
    Call,
    Kind,
    call_of,
    is_plain_birth,
    may_grow,
    seeded_variant,
    tensors_in,
)
from weightlift.deferred.defaults import DefaultDtype, WantedDtype
from weightlift.deferred.forcing import Forcing
from weightlift.deferred.piecemeal import is_piece, is_time_to_ask, pieces
from weightlift.deferred.refusals import Trials
from weightlift.deferred.resize import resized
from weightlift.deferred.schema import is_plain, result_of
from weightlift.deferred.seeding import SeedWatch
from weightlift.deferred.shapes import Result, infer, is_short_range
from weightlift.deferred.tape import Fill, Node, Operation, Record, ViewRef, frozen, generator_for

_push_mode = torch._C._push_on_torch_dispatch_stack
_pop_mode = torch._C._pop_torch_dispatch_stack
_stack_size = torch._C._len_torch_dispatch_stack
_storage_address = torch._C._storage_address  # type: ignore[attr-defined]
_NoDispatch = torch._C._DisableTorchDispatch  # of this thread, for as long as the object lives

# Results up to this size, of calls on values that exist already, are computed at once: it is cheaper than recording.
_EAGER_BYTES = 64 << 10
_EAGER_ELEMENTS = 4096


class Recorder(Forcing, TorchDispatchMode):
    """Defers the tensor work of one thread. Not shared between threads; its buffers may die on any. A recorder within
    another's scope takes that one's tensors as they come: they get their values first."""

    def __init__(self, *, seed: int, default_dtype: WantedDtype = None) -> None:
        TorchDispatchMode.__init__(self)  # type: ignore[no-untyped-call]
        Forcing.__init__(self, seed)
        self.default = DefaultDtype.of(default_dtype)
        self.failed: str | None = None  # what torch said of the last call that it refused, caught or not
        self._seq = 0
        self._seeding = SeedWatch()
        self.trials = Trials()
        self._in_use = threading.RLock()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap the method below to keep the compiler out of it, which imports the compiler.
        return False

    def __enter__(self) -> Recorder:
        # Not the base class's, which sets flags of the process that two threads leave set for good.
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        if _stack_size():  # not where an interrupt has skipped a step: `Undisturbed` makes that good
            _pop_mode(None)

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """Go on recording after the construction, in this thread; another that wants to waits."""
        with self._in_use:
            self._seeding = SeedWatch()
            with self:
                yield

    # -- dispatch ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types and not all(map(is_plain, types)):
            return self._foreign(func, args, kwargs)
        if _stack_size():  # torch's own modes (fake tensors, tracing) lie below all others, and this is their call
            return func(*args, **kwargs)
        if self.default is not None:
            args, kwargs = self.default.rewrite(func, args, kwargs, self._dispatch)
        try:
            return self._dispatch(func, args, kwargs)
        except RuntimeError as error:
            self.failed = str(error)
            raise

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        call = KINDS.get(func) or call_of(func)
        kind = call.kind
        if call.alone and not kwargs:
            if self.record_alone(func, args[0], args[1:], random=call.random, overwrites=call.overwrites):
                return args[0]
            if not call.random and self.record_of(args[0]) is None:
                return func(*args)  # memory from elsewhere, and nothing to wait for
        if kind is Kind.VIEW:
            return func(*args, **kwargs)
        if kind is Kind.WRITE:
            return self._write(func, call, args, kwargs)
        if kind is Kind.BIRTH:
            return self._birth_call(func, args, kwargs)
        if kind is Kind.PURE:
            return self._pure(func, call, args, kwargs)
        answer: Any = None
        if kind is Kind.RESIZE:
            answer = resized(self, func, args, kwargs)
        elif kind is Kind.BATCH_NORM and not kwargs:
            answer = batch_norm.put_off(self._dispatch, args)
        return self._now(func, call, args, kwargs) if answer is None else answer

    def _foreign(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call on tensors with a dispatch of their own (fake, DTensor, …): it gets real values and runs."""
        self.force_tensors(tensors_in((args, kwargs)), func)
        return func(*args, **kwargs)

    # -- births -----------------------------------------------------------------------------------------------------

    def _birth_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not is_plain_birth(args, kwargs):
            return self._now(func, call_of(func), args, kwargs)
        birth = BIRTHS[func](*args, **kwargs)
        if birth.random and self._seeding.seeded():
            return func(*args, **kwargs)
        return self._born(birth)

    def _born(self, birth: Birth) -> torch.Tensor:
        size = birth.size
        numel = prod(size)
        if numel <= 0 or birth.dtype.itemsize == 0 or min(size, default=0) < 0:
            return torch.empty(size, dtype=birth.dtype)  # which refuses negative sizes
        stride = birth.stride
        if birth.memory_format not in (None, torch.contiguous_format):
            stride = torch.empty(size, device="meta", memory_format=birth.memory_format).stride()
        span = numel
        if stride is not None:
            span = 1 + sum((extent - 1) * step for extent, step in zip(size, stride))
        tensor, record = self.reserve(span * birth.dtype.itemsize, birth.dtype)
        tensor = tensor.view(size) if stride is None else tensor.as_strided(size, stride)
        if birth.fill is not None:
            self.trials.make(birth.fill, tensor, birth.fill_args, random=birth.random)
            self.append_alone(birth.fill, record, tensor, birth.fill_args, True, birth.random)
        return tensor

    def bear(
        self, size: Sequence[int], numel: int, dtype: torch.dtype, fill: Any = None, values: tuple[Any, ...] = ()
    ) -> torch.Tensor:
        """A row-major tensor of at least one element, and ``fill(tensor, *values)`` recorded if there is one."""
        tensor, record = self.reserve(numel * dtype.itemsize, dtype)
        if len(size) != 1:
            # In place: what ATen would give is no view of anything. The guard keeps this mode out of it.
            guard = _NoDispatch()
            tensor.resize_(size)
            del guard
        if fill is not None:
            self.trials.make(fill, tensor, values, random=False)
            self._seq += 1
            record.last = Fill(self._seq, fill, record, tensor, values, False)
        return tensor

    # -- recording --------------------------------------------------------------------------------------------------

    def _append(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], writes: tuple[Record, ...],
        deps: tuple[tuple[Record, Node | None], ...], outputs: tuple[ViewRef, ...] | None, random: bool,
    ) -> None:  # fmt: skip
        self._seq += 1
        node = Operation(self._seq, func, args, kwargs, writes, deps, outputs, random)
        for record in writes:
            record.last = node
        for record, _ in deps:
            if record not in writes:
                record.known_readers().add(node)

    def append_alone(
        self, func: Any, record: Record, tensor: torch.Tensor, values: tuple[Any, ...], overwrites: bool, random: bool
    ) -> None:
        """`_append` of ``func(tensor, *values)``, short: initialisers are little else. Nothing is looked at."""
        self._seq += 1
        if overwrites and tensor.nbytes == record.nbytes and tensor.is_contiguous() and not tensor.is_neg():
            record.last = Fill(self._seq, func, record, tensor, values, random)
            return
        ref = ViewRef(record, tensor)
        deps = () if overwrites and ref.covers() else ((record, record.last),)
        record.last = Operation(self._seq, func, (ref, *values), {}, (record,), deps, None, random)
        if deps:
            self._changed_a_part(record, func)

    def record_alone(
        self, func: Any, tensor: torch.Tensor, values: tuple[Any, ...], *, random: bool, overwrites: bool = True
    ) -> bool:
        """Record ``func(tensor, *values)``, which changes the tensor, or ``overwrites`` it, out of these alone; if it
        is ``random``, out of the samples of a ``generator`` too. False when it has to go the way of every call.
        Raises what torch would."""
        record = self.record_of(tensor)
        if record is None or record.pinned or (random and self._seeding.seeded()):
            return False
        if record.at_once and not random and not (overwrites and ViewRef(record, tensor).covers()):
            return False
        self.trials.make(func, tensor, values, random=random)
        self.append_alone(func, record, tensor, values, overwrites, random)
        return True

    def record_source(self, tensor: torch.Tensor, fill: Callable[[torch.Tensor], None]) -> None:
        """Record that ``fill(tensor)`` gives a whole storage its values."""
        record = self.record_of(tensor)
        assert record is not None
        self._append(fill, (ViewRef(record, tensor),), {}, (record,), (), None, False)

    def _write(self, func: Any, call: Call, args: Any, kwargs: Any) -> Any:
        named = (kwargs[name] if isinstance(name, str) else args[name] for name in call.written)
        # A list of them in _foreach_* and split_copy.out, several lists in fused optimisers.
        targets = [target for item in named for target in (item if type(item) is list else (item,))]
        records = [self.record_of(target) for target in targets]
        if any(record is None or record.pinned for record in records) or self._samples_now(call, kwargs):
            return self._now(func, call, args, kwargs)
        if records[0] is not None and records[0].at_once:
            known = [self.record_of(tensor) for tensor in tensors_in((args, kwargs))]
            if is_piece(call, targets, records[0], known):
                return self._now(func, call, args, kwargs)
        beside = [tensor for tensor in tensors_in((args, kwargs)) if self.record_of(tensor) is records[0]]
        if not self.trials.may_wait(func, call, targets, args, kwargs, beside):
            return self._now(func, call, args, kwargs)  # which raises
        reads: dict[Record, Node | None] = {}
        frozen_args, frozen_kwargs = frozen(args, reads, self.record_of), frozen(kwargs, reads, self.record_of)
        writes = tuple(dict.fromkeys(record for record in records if record is not None))
        if call.overwrites and len(writes) == 1 and ViewRef(writes[0], targets[0]).covers():
            # By position: a tensor may also be copied onto itself.
            read = [item for place, item in [*enumerate(args), *kwargs.items()] if place not in call.written]
            if all(self.record_of(source) is not writes[0] for source in tensors_in(read)):
                del reads[writes[0]]  # every byte is defined and none is read
        if call.random:
            frozen_kwargs.pop("generator", None)
        self._append(func, frozen_args, frozen_kwargs, writes, tuple(reads.items()), None, call.random)
        for record in writes:
            if record in reads:
                self._changed_a_part(record, func)
        return result_of(func, targets)

    def _changed_a_part(self, record: Record, why: Any) -> None:
        """Counts a recorded call. Where very many change one storage, they are run, and later ones not put off."""
        if is_time_to_ask(record) and (nodes := pieces(record)):
            with contextlib.suppress(Exception):  # what then waits raises where its values are asked for
                self._execute(nodes, why)
                record.memory()
                record.at_once = True

    def _samples_now(self, call: Call, kwargs: Any) -> bool:
        return call.random and (kwargs.get("generator") is not None or self._seeding.seeded())

    def _pure(self, func: Any, call: Call, args: Any, kwargs: Any) -> Any:
        tensors = tensors_in((args, kwargs))
        pending, elements = False, 0
        for tensor in tensors:
            record = self.record_of(tensor)
            pending = pending or (record is not None and record.pending)
            elements += tensor.numel()
        if self._samples_now(call, kwargs) or (call.random and seeded_variant(func) is None):
            return self._now(func, call, args, kwargs)
        small = not call.random and not pending and elements <= _EAGER_ELEMENTS
        if small and call.pointwise and tensors and (len(tensors) == 1 or not may_grow(tensors)):
            return self._run(func, call, args, kwargs, tensors)
        if not tensors and not call.random and is_short_range(func, args, _EAGER_ELEMENTS):
            return self._run(func, call, args, kwargs, tensors)
        outputs = infer(func, args, kwargs)
        if outputs is None or any(out.nbytes == 0 or out.dtype not in DTYPES for out in outputs):
            return self._now(func, call, args, kwargs)
        if not pending and not call.random and sum(out.nbytes for out in outputs) <= _EAGER_BYTES:
            return self._run(func, call, args, kwargs, tensors)
        if not call.random and not self.trials.are_taken(func, args, kwargs):
            return self._now(func, call, args, kwargs)
        return self._defer_results(func, call, args, kwargs, outputs)

    def _defer_results(self, func: Any, call: Call, args: Any, kwargs: Any, outputs: list[Result]) -> Any:
        reads: dict[Record, Node | None] = {}
        frozen_args, frozen_kwargs = frozen(args, reads, self.record_of), frozen(kwargs, reads, self.record_of)
        born = [self._born(Birth(out.shape, out.dtype, stride=out.stride)) for out in outputs]
        records = tuple(self.records[_storage_address(tensor)] for tensor in born)
        refs = tuple(ViewRef(record, tensor) for record, tensor in zip(records, born))
        if call.random:
            func = seeded_variant(func)
            frozen_kwargs.pop("generator", None)
        self._append(func, frozen_args, frozen_kwargs, records, tuple(reads.items()), refs, call.random)
        returns = func._schema.returns
        if len(returns) == 1:
            return born[0] if str(returns[0].type) == "Tensor" else born
        return tuple(born)

    # -- doing it now -----------------------------------------------------------------------------------------------

    def _now(self, func: Any, call: Call, args: Any, kwargs: Any) -> Any:
        """Give the arguments their values and run the call as it is."""
        tensors = tensors_in((args, kwargs))
        self.force_tensors(tensors, func)
        if call.random and kwargs.get("generator") is None and not self._seeding.seeded():
            # What the constructor itself reads is seeded by its ordinal; the process's generator is not drawn from.
            variant = seeded_variant(func)
            if variant is not None:
                func, kwargs = variant, {**kwargs, "generator": generator_for(self.seed, self._next_read_label())}
        result = self._run(func, call, args, kwargs, tensors)
        if call.random:
            self._note(func, sum(tensor.nbytes for tensor in tensors_in(result) if tensor.layout is torch.strided))
        return result

    def _run(self, func: Any, call: Call, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        lazily = False
        for tensor in tensors:
            record = self.record_of(tensor)
            if record is not None and not record.opened:
                record.memory()
            lazily = lazily or tensor.is_complex()
        for name in call.written:
            target = kwargs.get(name) if isinstance(name, str) else args[name]
            for tensor in tensors_in(target):
                self.settle_readers(tensor, func)
                if (record := self.record_of(tensor)) is not None:
                    record.pieces += 1
        if lazily:  # within the call there may be lazy views, too
            with lazy_views_as_they_are():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def sampling_now(self) -> bool:
        """True when the constructor has seeded the process's generator: from there on it samples as it goes."""
        return self._seeding.seeded()
