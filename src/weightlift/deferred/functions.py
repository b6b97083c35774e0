"""The function-level companion of the recorder: calls that reach a tensor's memory without ATen.

It also defers ``torch.nn.init.trunc_normal_`` whole. That function draws, looks whether a sample fell outside
(``if mask.any()``) and draws again, so its ATen calls can't be put off one by one; and being a plain Python function,
no mode sees it. Its calls of ``Tensor.normal_`` and ``Tensor.uniform_`` are seen, though, and the frame that makes them
holds its arguments. What was recognised is checked once a process against the real function
(`trunc_normal_is_recognisable`); where torch's code has changed too far, ``trunc_normal_`` runs when it is called,
which is slower and just as right.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from weightlift.ambient import no_dispatch_modes
from weightlift.deferred.calls import tensors_in
from weightlift.deferred.neighbours import answer
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.shortcuts import FILLS, Handler, Shortcuts, handlers, is_watched
from weightlift.deferred.tape import Node, generator_for

_Tensor = torch.Tensor
# Asked with the frame that made a call, its arguments and keyword arguments; NotImplemented lets the call go its way.
Answer = Callable[[FrameType, Any, Any], Any]
_TRUNC_NORMAL: Any = getattr(torch.nn.init, "_no_grad_trunc_normal_", None)
_TRUNC_CODE: CodeType | None = getattr(_TRUNC_NORMAL, "__code__", None)

# Read or hand out the memory itself. Afterwards somebody may hold it, so later writes to it are not put off.
_ESCAPES = {
    _Tensor.numpy, _Tensor.__array__, _Tensor.data_ptr, _Tensor.untyped_storage, _Tensor.storage,
    _Tensor._typed_storage, _Tensor.__dlpack__, _Tensor.share_memory_,
    _Tensor.apply_, _Tensor.map_, _Tensor.map2_,
}  # fmt: skip
# Read the values, or run Python code that does, and keep no hold of the memory.
_READS = {
    _Tensor.tolist, _Tensor.__repr__, _Tensor.__format__, _Tensor.__reduce_ex__, torch.tensor,
}  # fmt: skip
# Make tensors of data; of a tensor one that shares its memory, or a copy by calls that are seen.
_AS_TENSORS = {torch.as_tensor, torch.asarray}
# Read where to cut in C++, below all calls that are seen.
_SPLITS = {torch.tensor_split, _Tensor.tensor_split}
# Composed in C++ of factories and of loops over the memory that those give: no call of theirs may be put off.
_WHOLE = {
    torch._sobol_engine_initialize_state_, torch._sobol_engine_scramble_, torch._sobol_engine_ff_,
    torch._sobol_engine_draw,
}  # fmt: skip
# What another default dtype concerns.
_DATA = {torch.tensor, *_AS_TENSORS}
_CASTS = {_Tensor.to, _Tensor.type}


class FunctionRecorder(Shortcuts, TorchFunctionMode):
    """Sees every torch function that the constructor calls on its own thread."""

    def __init__(
        self, recorder: Recorder, *, recognise: bool | None = None, answers: Mapping[Any, Answer] | None = None
    ) -> None:
        super().__init__()
        self._recorder = recorder
        self._answers = answers or {}
        self._trunc_normal = trunc_normal_is_recognisable() if recognise is None else recognise
        # By plain functions, not by methods bound to this object: with those in it, it would stay in a cycle, and with
        # it the recorder and the memory that small tensors are cut from, until the collector came.
        own = {**handlers(), **_OWN}
        if self._trunc_normal:
            own.update(_TRUNC_NORMAL_CALLS)
        if recorder.default is not None:
            own.update(_OF_DTYPES)
        self._declined: dict[Any, Handler] = {func: own.get(func, FunctionRecorder._plain) for func in self._answers}
        own.update(dict.fromkeys(self._answers, FunctionRecorder._answered))
        self._handlers: dict[Any, Handler] = own

    def __exit__(self, *exc: Any) -> None:
        if torch._C._len_torch_function_stack():  # as `Recorder.__exit__`
            super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = self._handlers.get(func)
        if self._recorder.wishes:
            answer(self._recorder)
        try:
            if handler is not None:
                return handler(self, func, args, kwargs or {})
            return func(*args, **kwargs) if kwargs else func(*args)
        except RuntimeError as error:
            self._recorder.failed = str(error)
            raise

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._recorder.force_tensors(tensors_in((args, kwargs)), func)
        return func(*args, **kwargs)

    def _as_tensor(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs) if args and isinstance(args[0], _Tensor) else self._read(func, args, kwargs)

    def _split(self, func: Any, args: Any, kwargs: Any) -> Any:
        others = {name: value for name, value in kwargs.items() if name not in ("self", "input")}
        self._recorder.force_tensors(tensors_in((args[1:], others)), func)
        return func(*args, **kwargs)

    def _answered(self, func: Any, args: Any, kwargs: Any) -> Any:
        answer = self._answers[func](_caller(), args, kwargs)
        declined = self._declined[func]
        return declined(self, func, args, kwargs) if answer is NotImplemented else answer

    def _plain(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _data(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``torch.tensor([1.0])`` under another default dtype."""
        found = (self._as_tensor if func in _AS_TENSORS else self._read)(func, args, kwargs)
        default = self._recorder.default
        dtype = None if default is None or not args else default.of_data(args[0], kwargs, found.dtype)
        return found if dtype is None else func(*args, **{**kwargs, "dtype": dtype})

    def _cast(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``tensor.to(torch.get_default_dtype())`` under another default dtype."""
        default, frame = self._recorder.default, _caller()
        if default is not None and "get_default_dtype" in frame.f_code.co_names:
            args = tuple(default.wanted if default.is_given(item, frame) else item for item in args)
            if default.is_given(kwargs.get("dtype"), frame):
                kwargs = {**kwargs, "dtype": default.wanted}
        return func(*args, **kwargs)

    def _whole(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._recorder.force_tensors(tensors_in((args, kwargs)), func)
        with no_dispatch_modes():
            return func(*args, **kwargs)

    def _escape(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._recorder.give_up(tensors_in((args, kwargs)), func)
        return func(*args, **kwargs)

    def _new_tensor(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._trunc_normal and (frame := _caller()).f_code is _TRUNC_CODE and self._can_defer(frame):
            return _ACCEPTED  # one of the bounds, in the tensor's dtype
        self._recorder.force_tensors(tensors_in((args[1:], kwargs)), func)
        return func(*args, **kwargs)

    def _deepcopy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``copy.deepcopy`` of a plain tensor copies its storage below ATen; here the copy is recorded."""
        tensor, memo = args[0], args[1]
        record = self._recorder.record_of(tensor)
        odd = type(tensor) is not _Tensor or not tensor.is_leaf or tensor.is_conj() or tensor.is_neg()
        if record is None or not record.pending or odd:
            self._recorder.force_tensors([tensor], func)  # not what the memo holds: all that was copied before
            return func(*args, **kwargs)
        if id(tensor) in memo:
            return memo[id(tensor)]
        copies = memo.setdefault("torch", {})  # where torch keeps the storages that were copied already
        storage = tensor.untyped_storage()
        if storage._cdata not in copies:
            source = torch.empty(0, dtype=torch.uint8).set_(storage)
            with self._recorder:
                copies[storage._cdata] = source.clone().untyped_storage()
        copied = torch.empty(0, dtype=tensor.dtype)
        copied.set_(copies[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
        copied.requires_grad_(tensor.requires_grad)
        memo[id(tensor)] = copied
        return copied

    # -- trunc_normal_ ------------------------------------------------------------------------------------------------

    def _sample(self, func: Any, args: Any, kwargs: Any) -> Any:
        frame = _caller()
        if frame.f_code is not _TRUNC_CODE or not self._can_defer(frame):
            return self.fill(func, args, kwargs)
        values = frame.f_locals
        tensor = values["tensor"]
        record = self._recorder.record_of(tensor)
        if args[0] is tensor and record is not None:
            arguments = (values["mean"], values["std"], values["a"], values["b"])
            self._recorder.trials.make(FILLS[func][0], tensor, args[1:], random=True)  # its own warning was given
            self._recorder.append_alone(_TRUNC_NORMAL, record, tensor, arguments, True, True)
        return _ACCEPTED

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        frame = _caller()
        if frame.f_code is _TRUNC_CODE and self._can_defer(frame):
            return args[0]
        return func(*args, **kwargs)

    def _can_defer(self, frame: FrameType) -> bool:
        """True when the call of ``trunc_normal_`` that ``frame`` belongs to is one to record."""
        values = frame.f_locals
        record = self._recorder.record_of(values["tensor"])
        return (
            record is not None
            and not record.pinned
            and values["generator"] is None
            and not is_watched()
            and not self._recorder.sampling_now()
        )


_OWN: dict[Any, Handler] = {
    **dict.fromkeys(_ESCAPES, FunctionRecorder._escape),
    **dict.fromkeys(_READS, FunctionRecorder._read),
    **dict.fromkeys(_AS_TENSORS, FunctionRecorder._as_tensor),
    **dict.fromkeys(_SPLITS, FunctionRecorder._split),
    **dict.fromkeys(_WHOLE, FunctionRecorder._whole),
    _Tensor.new_tensor: FunctionRecorder._new_tensor,
    _Tensor.__deepcopy__: FunctionRecorder._deepcopy,
}
_TRUNC_NORMAL_CALLS: dict[Any, Handler] = {
    _Tensor.normal_: FunctionRecorder._sample,
    _Tensor.uniform_: FunctionRecorder._sample,
    _Tensor.copy_: FunctionRecorder._copy,
}
# Where the constructor is to find another default dtype.
_OF_DTYPES: dict[Any, Handler] = {
    **dict.fromkeys(_DATA, FunctionRecorder._data),
    **dict.fromkeys(_CASTS, FunctionRecorder._cast),
}


class _Accepted:
    """Stands for samples while ``trunc_normal_`` looks at them: none lies outside the bounds."""

    def _itself(self, *_: Any) -> _Accepted:
        return self

    __lt__ = __gt__ = __or__ = log_ = gt = _itself

    def any(self) -> bool:
        return False

    def item(self) -> float:
        return 0.0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented  # it is only ever an argument of calls that the mode above answers itself


_ACCEPTED = _Accepted()


def _caller() -> FrameType:
    """The frame that made the call which a handler was asked about, below any modes on the way."""
    frame = sys._getframe(3)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


@functools.cache
def trunc_normal_is_recognisable() -> bool:
    """Does torch's ``trunc_normal_`` still look for outliers in a way that recording it whole can stand for?

    Decided once a process, by recording both of its branches on small tensors and comparing with the function itself.
    """
    return _TRUNC_CODE is not None and all(_trial(bounds) for bounds in ((-2.0, 2.0), (1.0, 1.2)))


def _trial(bounds: tuple[float, float]) -> bool:
    try:
        with no_dispatch_modes():
            return _trial_alone(Recorder(seed=0), bounds)
    except Exception:  # another torch: run trunc_normal_ when it is called
        return False


def _trial_alone(recorder: Recorder, bounds: tuple[float, float]) -> bool:
    with FunctionRecorder(recorder, recognise=True), recorder:
        tensor = torch.empty(64)
        torch.nn.init.trunc_normal_(tensor, 0.0, 1.0, *bounds)
    record = recorder.record_of(tensor)
    node: Node | None = None if record is None else record.last
    if node is None or node.func is not _TRUNC_NORMAL or recorder.forced:
        return False
    node.seed_label = "trial"
    with torch.no_grad():
        node.execute(0)
        expected = torch.empty(64)
        _TRUNC_NORMAL(expected, 0.0, 1.0, *bounds, generator=generator_for(0, "trial"))
    return torch.equal(tensor, expected)
