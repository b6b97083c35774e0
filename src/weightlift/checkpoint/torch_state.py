"""From the object in a torch pickle to records: the rules of a state dict, the same for both file formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from weightlift.checkpoint.entry import TensorEntry
from weightlift.checkpoint.part import WHOLE, Part, told
from weightlift.checkpoint.torch_globals import (
    BrokenPickleError,
    ForbiddenGlobalError,
    Global,
    Opaque,
    StorageRef,
    StorageType,
    TensorRef,
    hint_for,
    is_integer,
)
from weightlift.checkpoint.torch_lenient import LenientReader
from weightlift.checkpoint.torch_pickle import PickleReader
from weightlift.errors import CheckpointError, Problem
from weightlift.strides import interval, is_row_major

SUMMARY = "not a valid torch checkpoint"
_AMID = "the weights are inside: {} reads them alone"
_LOSSY = "holds what only code could make, which weightlift never runs"
_MAX_DEPTH = 100
_NO_WEIGHTS = ("optim", "sched", "lr_sched", "scaler", "grad_scaler", "callbacks")
_ELSEWHERE = "that is what a trainer keeps beside weights, which are in another file or folder"
_USUAL = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")

Place = Callable[[StorageRef], "tuple[int, int] | Problem"]
"""Gives the half-open byte range of a storage in the file, or what is wrong with it."""


def reader_for(part: Part) -> PickleReader:
    """What reads the pickle that holds ``part``."""
    return LenientReader() if part.is_amid_others else PickleReader()


def unpickle(reader: PickleReader, stream: Any, path: Path, again: Callable[[], Any] | None = None) -> Any:
    """`PickleReader.read`, its refusals as `CheckpointError`. ``again`` gives the stream as it was, to look what else
    there is beside code."""
    try:
        return reader.read(stream)
    except ForbiddenGlobalError as error:
        hint = hint_for(str(error)) or (None if again is None else _weights_amid_code(again()))
        problem = Problem(
            "the pickle holds code, which weightlift never runs",
            file=path,
            expected="a state dict of tensors",
            found=str(error),
            hint=hint or "have somebody you trust save the state dict again, best as safetensors",
        )
        raise CheckpointError(SUMMARY, [problem]) from None
    except BrokenPickleError as error:
        problem = Problem(
            "the pickle is damaged or not a checkpoint", file=path, found=str(error), hint="is the download complete?"
        )
        raise CheckpointError(SUMMARY, [problem]) from None


def _weights_amid_code(stream: Any) -> str | None:
    """Where in a pickle with code weights lie; None if nowhere to be told."""
    try:
        root = LenientReader().read(stream)
    except BrokenPickleError:
        return None
    nested = _nested(root, _is_record) if isinstance(root, Mapping) else {}
    names = _weights_in(nested, _is_record, set())
    return _AMID.format(Part(names).call) if names else None


def _is_record(value: Any) -> bool:
    return isinstance(value, TensorRef)


class StateDict:
    """The conversion of one unpickled object, or a part of it. Collects every problem, then raises once."""

    def __init__(self, path: Path, place: Place, reader: PickleReader, part: Part = WHOLE) -> None:
        self.path = path
        self._reader = reader
        self._part = part
        self.entries: list[TensorEntry] = []
        self.extras: dict[str, object] = {}
        self.problems: list[Problem] = []
        self._place = place
        self._placed: dict[StorageRef, tuple[int, int] | Problem] = {}

    def convert(self, whole: Any) -> Any:
        """Fill ``entries`` and ``extras`` from the part of ``whole``, which is returned, or raise `CheckpointError`."""
        root = self._part.find(whole, self.path)
        problem = flat_problem(root, self.path, _is_tensor, self._part)
        if problem is not None:
            raise CheckpointError(SUMMARY, [problem])
        if self._reader.is_lossy(root):
            raise CheckpointError(SUMMARY, [Problem(_LOSSY, file=self.path, expected="names and tensors")])
        for key, value in root.items():
            if isinstance(value, TensorRef):
                entry = self._entry(key, value)
                if entry is not None:
                    self.entries.append(entry)
            elif isinstance(value, Opaque):
                wanted = "a dense, strided tensor"
                self._problem(key, f"is {value.what}, which weightlift cannot read", expected=wanted, hint=value.hint)
            else:
                self.extras[key] = self._extra(key, value, {}, 0)
        if self.problems:
            raise CheckpointError(SUMMARY, self.problems)
        return root

    def value(self, key: str, held: Any) -> object:
        """One value by itself, as ``extras`` has it; a tensor as its `TensorEntry`. Raises `CheckpointError`."""
        found = self._extra(key, held, {}, 0)
        if self.problems:
            raise CheckpointError(SUMMARY, self.problems)
        return found

    def _problem(self, key: str, what: str, **more: Any) -> None:
        self.problems.append(Problem(what, key=key, file=self.path, **more))

    def _entry(self, key: str, ref: TensorRef) -> TensorEntry | None:
        where = self._placed.get(ref.storage)
        if where is None:
            where = self._placed[ref.storage] = self._place(ref.storage)
            if isinstance(where, Problem):
                self.problems.append(where)  # once for all the tensors over it
        if isinstance(where, Problem):
            return None
        begin, end = where
        if len(ref.shape) != len(ref.stride) or ref.offset < 0 or min((*ref.shape, *ref.stride), default=0) < 0:
            found = f"shape {list(ref.shape)}, stride {list(ref.stride)}, offset {ref.offset}"
            self._problem(key, "shape, stride and offset are no tensor's", found=found)
            return None
        itemsize = ref.dtype.itemsize
        start = begin + ref.storage.first * ref.storage.dtype.itemsize + ref.offset * itemsize
        stop = start + interval(ref.shape, ref.stride, 0)[1] * itemsize
        if stop == start:
            start = stop = min(start, end)  # no byte belongs to a tensor without elements
        if stop > end:
            self._problem(
                key,
                "lies beyond the end of its storage",
                start=start,
                end=stop,
                expected=f"a range within {begin}:{end}",
                found=f"{start}:{stop}",
            )
            return None
        if max((0, *ref.shape, *ref.stride)) >= 2**63 or prod(ref.shape) * itemsize >= 2**63:
            expected = "fewer than 2**63 bytes"
            self._problem(key, "torch cannot hold this shape", expected=expected, found=f"shape {list(ref.shape)}")
            return None
        stride = None if 0 in ref.shape or is_row_major(ref.shape, ref.stride) else ref.stride
        return TensorEntry(key, ref.shape, ref.dtype, self.path, start, stop, stride)

    def _extra(self, key: str, value: Any, seen: dict[int, Any], depth: int) -> object:
        """A copy of a value that is no tensor, in which tensors are `TensorEntry` records."""
        if value is None or isinstance(value, (str, int, float, complex, bytes, torch.Size, torch.dtype, torch.device)):
            return value
        if id(value) in seen or depth > _MAX_DEPTH:
            if id(value) not in seen:
                self._problem(key, "is nested too deeply", expected=f"{_MAX_DEPTH} levels at most")
            return seen.get(id(value))
        if isinstance(value, TensorRef):
            return self._entry(key, value)
        if self._reader.is_lossy(value):
            self._problem(key, _LOSSY)
            return None
        made: Any
        if isinstance(value, dict):
            made = seen[id(value)] = type(value)()
            for name, item in value.items():
                made[name] = self._extra(key, item, seen, depth + 1)
        elif isinstance(value, list):
            made = seen[id(value)] = []
            made.extend(self._extra(key, item, seen, depth + 1) for item in value)
        elif isinstance(value, tuple):
            made = seen[id(value)] = tuple(self._extra(key, item, seen, depth + 1) for item in value)
        elif isinstance(value, (set, bytearray)):
            made = type(value)(value)
        else:
            names = {Opaque: "what", Global: "name", StorageType: "dtype", StorageRef: "key"}
            found = getattr(value, names.get(type(value), "__doc__"), None)
            found = found if isinstance(value, Opaque) else f"{type(value).__name__} {found}"
            hint = value.hint if isinstance(value, Opaque) else None
            self._problem(key, "holds a value that weightlift cannot read", found=found, hint=hint)
            return None
        return made


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (TensorRef, Opaque))


def flat_problem(
    root: Any, file: Path | str, is_tensor: Callable[[Any], bool], part: Part = WHOLE
) -> Problem | None:
    """What keeps ``root`` from being a flat mapping of names to tensors; None if nothing does.

    Values that are no tensors are allowed beside tensors, and ``…_extra_state`` may hold tensors (as modules make it).
    So may other mappings, as an optimiser's state beside the weights: they are nested weights if one has more tensors.
    """
    expected = "a mapping of names to tensors"
    if not isinstance(root, Mapping):
        found = told(root) if isinstance(root, Opaque) else "one tensor" if is_tensor(root) else told(root)
        return Problem("is not a state dict", file=file, expected=expected, found=found)
    odd = [key for key in root if type(key) is not str]
    if odd:
        found = f"the key {odd[0]!r:.100}" if type(odd[0]) in (float, bool, bytes, type(None)) else told(odd[0])
        if is_integer(odd[0]):
            found = f"the key {odd[0]}"
        return Problem("has keys that are not strings", file=file, expected=expected, found=found)
    nested = _nested(root, is_tensor)
    if any(map(is_tensor, root.values())):  # beside weights an optimiser's state is no weights, however large it is
        nested = {key: value for key, value in nested.items() if not _is_no_weights(key, value)}
    if nested:
        names = _weights_in(nested, is_tensor, set())
        inside = Part((*part.names, *names))
        hint = f"the weights are inside: pass the mapping that holds them, as in given{inside.path}"
        if isinstance(file, Path):
            hint = _AMID.format(inside.call)
        found = f"mappings under {', '.join(map(repr, nested))}"
        what = "the state dict is nested"
        elsewhere = _ELSEWHERE if all(_is_no_weights(key, value) for key, value in nested.items()) else None
        return Problem(what, file=file, expected=expected, found=found, hint=hint if names else elsewhere)
    if not any(is_tensor(value) or key.endswith("_extra_state") for key, value in root.items()):
        found = f"{len(root)} values, none of them a tensor" if root else "an empty mapping"
        arrays = any(hasattr(value, "__array__") for value in root.values())
        made = "torch.from_numpy makes tensors of arrays" if arrays else None
        return Problem("holds no tensor", file=file, expected=expected, found=found, hint=made)
    return None


def _nested(root: Mapping[Any, Any], is_tensor: Callable[[Any], bool]) -> dict[str, Mapping[Any, Any]]:
    """The mappings within it that have, or within which one has, more tensors than it has itself.

    They may hold one another in any number of ways: each is looked at once.
    """
    direct = sum(map(is_tensor, root.values()))
    holders: dict[int, list[Mapping[Any, Any]]] = {}
    more: list[Mapping[Any, Any]] = []
    seen, left = {id(root)}, [root]
    while left:
        mapping = left.pop()
        for value in mapping.values():
            if isinstance(value, Mapping):
                holders.setdefault(id(value), []).append(mapping)
                if id(value) not in seen:
                    seen.add(id(value))
                    left.append(value)
        if sum(map(is_tensor, mapping.values())) > direct:
            more.append(mapping)
    found: set[int] = set()
    while more:
        mapping = more.pop()
        if id(mapping) not in found:
            found.add(id(mapping))
            more += holders.get(id(mapping), ())
    return {
        key: value
        for key, value in root.items()
        if type(key) is str and not key.endswith("_extra_state") and id(value) in found
    }


def _is_no_weights(key: str, value: Mapping[Any, Any]) -> bool:
    """Whether it is an optimiser's state or the like, by its name or, whatever that is, by what it holds."""
    return key.lower().startswith(_NO_WEIGHTS) or {"state", "param_groups"} <= value.keys()


def _weights_in(
    mappings: Mapping[str, Any], is_tensor: Callable[[Any], bool], seen: set[int]
) -> tuple[str, ...]:
    """The most likely way to a model's weights: by a usual name, else to a mapping of tensors; what optimisers and
    averages hold lies deeper, or comes after. Empty where none was found."""
    mappings = {key: value for key, value in mappings.items() if not _is_no_weights(key, value)}
    flat = [key for key in mappings if any(map(is_tensor, mappings[key].values()))]
    for key in dict.fromkeys((*(key for key in _USUAL if key in mappings), *flat, *mappings)):
        within = mappings[key]
        if key in flat:
            return (key,)
        if id(within) not in seen and len(seen) < _MAX_DEPTH:
            seen.add(id(within))
            deeper = {name: item for name, item in within.items() if type(name) is str and isinstance(item, Mapping)}
            if names := _weights_in(deeper, is_tensor, seen):
                return key, *names
    return ()


def versions(attributes: Mapping[str, Any]) -> Mapping[str, Mapping[str, object]] | None:
    """The ``_metadata`` of a pickled state dict, read-only; None when it has none or it is not what modules write."""
    value = attributes.get("_metadata")
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        return None
    return MappingProxyType({str(name): MappingProxyType(dict(item)) for name, item in value.items()})
