"""The options of a load, checked once and frozen."""

from __future__ import annotations

import difflib
import operator
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import torch

from weightlift.patterns import Patterns

DtypeOption = torch.dtype | str | Mapping[str, "torch.dtype | str | None"] | None
CheckedDtype = torch.dtype | str | Patterns["torch.dtype | str | None"] | None
DeviceOption = torch.device | str | int | None
KeyMapping = Mapping[str, str] | Callable[[str], "str | None"]
ProgressOption = bool | Callable[[int, int], None] | None
Parallelize = Callable[[Any], Any]

DEFAULT_WORKERS = 8
DEFAULT_BUDGET_BYTES = 512 << 20
DEFAULT_RANK_PATIENCE_SECONDS = 60.0


def default_workers() -> int:
    """``HF_PARALLEL_LOADING_WORKERS`` where it is set to a positive number, else 8; 1 where
    ``HF_ENABLE_PARALLEL_LOADING`` is set to something that does not enable it."""
    if (os.environ.get("HF_ENABLE_PARALLEL_LOADING") or "1").upper() not in ("1", "ON", "YES", "TRUE"):
        return 1
    text = os.environ.get("HF_PARALLEL_LOADING_WORKERS", "")
    try:
        count = int(text)
    except ValueError:
        return DEFAULT_WORKERS
    return count if count > 0 else DEFAULT_WORKERS


class LoadKeywords(TypedDict, total=False):
    """What `weightlift.load` takes by name, for type checkers."""

    dtype: DtypeOption
    device: DeviceOption
    device_map: Mapping[str, DeviceOption] | None
    strict: bool
    ignore_mismatched: bool
    key_mapping: KeyMapping | None
    copy: bool
    workers: int | None
    memory_budget_bytes: int | None
    seed: int | None
    progress: ProgressOption
    cancel: threading.Event | None
    defer: bool
    trace: str | os.PathLike[str] | None
    verify: bool
    parallelize: Parallelize | None
    source_rank: int | None
    process_group: Any
    rank_patience_seconds: float
    revision: str | None
    token: str | bool | None
    local_files_only: bool


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What `weightlift.load` and `weightlift.plan` take, validated. See `weightlift.load` for the meanings."""

    dtype: CheckedDtype = None
    device: torch.device | None = None
    device_map: Mapping[str, torch.device] | None = None
    strict: bool = True
    ignore_mismatched: bool = False
    key_mapping: KeyMapping | None = None
    copy: bool = False
    workers: int = DEFAULT_WORKERS
    memory_budget_bytes: int = DEFAULT_BUDGET_BYTES
    seed: int = 0
    progress: ProgressOption = None
    cancel: threading.Event | None = None
    defer: bool = True
    trace: Path | None = None
    verify: bool = False
    parallelize: Parallelize | None = None
    source_rank: int | None = None
    process_group: Any = None
    rank_patience_seconds: float = DEFAULT_RANK_PATIENCE_SECONDS

    @classmethod
    def create(
        cls,
        *,
        dtype: DtypeOption = None,
        device: DeviceOption = None,
        device_map: Mapping[str, DeviceOption] | None = None,
        strict: bool = True,
        ignore_mismatched: bool = False,
        key_mapping: KeyMapping | None = None,
        copy: bool = False,
        workers: int | None = None,
        memory_budget_bytes: int | None = None,
        seed: int | None = None,
        progress: ProgressOption = None,
        cancel: threading.Event | None = None,
        defer: bool = True,
        trace: str | os.PathLike[str] | None = None,
        verify: bool = False,
        parallelize: Parallelize | None = None,
        source_rank: int | None = None,
        process_group: Any = None,
        rank_patience_seconds: float = DEFAULT_RANK_PATIENCE_SECONDS,
    ) -> LoadOptions:
        """Check what a user gave and fill in the defaults.

        Raises ValueError or TypeError for what can't be meant, OSError for a trace that can't be written.
        """
        if device is not None and device_map is not None:
            raise ValueError("give either device or device_map, not both")
        _check_flags(strict=strict, ignore_mismatched=ignore_mismatched, copy=copy, defer=defer, verify=verify)
        _check_count("workers", workers)
        _check_count("memory_budget_bytes", memory_budget_bytes)
        if progress is not None and not isinstance(progress, bool) and not callable(progress):
            raise TypeError(f"progress must be a bool or a callable of bytes done and in all, found {progress!r}")
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise TypeError(f"cancel must be a threading.Event, found {cancel!r}")
        _check_key_mapping(key_mapping)
        _check_ranks(parallelize, source_rank, rank_patience_seconds)
        if verify and (parallelize is not None or source_rank is not None):
            before = "call open_checkpoint(…, verify=True) before, on one rank"
            raise ValueError(f"verify reads whole files, which no rank of a spread load does; {before}")
        return cls(
            dtype=_dtypes(dtype), device=_device("device", device), device_map=_device_map(device_map), strict=strict,
            ignore_mismatched=ignore_mismatched, key_mapping=key_mapping, copy=copy,
            workers=default_workers() if workers is None else workers,
            memory_budget_bytes=DEFAULT_BUDGET_BYTES if memory_budget_bytes is None else memory_budget_bytes,
            seed=used_seed(seed), progress=progress, cancel=cancel, defer=defer,
            trace=None if trace is None else _writable(trace), verify=verify, parallelize=parallelize,
            source_rank=source_rank, process_group=process_group, rank_patience_seconds=float(rank_patience_seconds),
        )  # fmt: skip


def require_known(options: Mapping[str, object]) -> None:
    """Raises TypeError for the name of an option that there is not, or that says how to build what is built by now."""
    known = [field.name for field in fields(LoadOptions) if field.name != "defer"]
    for name in options:
        if name == "defer":
            text = "the module has been built, deferred; weightlift.load(build, ckpt, defer=False) builds ordinarily"
            raise TypeError(f"'defer' is no option here: {text}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
            raise TypeError(f"{name!r} is no option of a load{hint}")


def used_seed(seed: int | None) -> int:
    """What a user gave, or torch's own, which is read and not drawn from. Raises TypeError."""
    if seed is None:
        return torch.initial_seed()
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be a whole number, found {seed!r}") from None


def _writable(path: str | os.PathLike[str]) -> Path:
    """The file of a trace, to be written after hours of work, maybe. Raises OSError now if that could not be done."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"trace must be a file to write, found the folder {target}")
    if target.exists():
        if not os.access(target, os.W_OK):
            raise PermissionError(f"trace: the file {target} may not be written to; choose another")
    elif not target.parent.is_dir():
        raise FileNotFoundError(f"trace: there is no folder {target.parent} for {target.name}; make it first")
    elif not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"trace: nothing may be written to the folder {target.parent}; choose another")
    return target


def _check_flags(**flags: object) -> None:
    for option, flag in flags.items():
        if not isinstance(flag, bool):  # what is taken for true may be meant otherwise: strict="no"
            raise TypeError(f"{option} must be True or False, found {flag!r}")


def _check_count(option: str, count: int | None) -> None:
    if count is not None and not isinstance(count, int):
        raise TypeError(f"{option} must be a whole number, found {count!r}")
    if count is not None and count < 1:
        raise ValueError(f"{option} must be at least 1, found {count!r}")


def _check_ranks(parallelize: Parallelize | None, source_rank: int | None, patience: float) -> None:
    if parallelize is not None and not callable(parallelize):
        raise TypeError(f"parallelize must be a callable that takes the module, found {parallelize!r}")
    if source_rank is not None and (not isinstance(source_rank, int) or source_rank < 0):
        raise ValueError(f"source_rank must be the number of a rank, found {source_rank!r}")
    if not patience > 0:
        raise ValueError(f"rank_patience_seconds must be positive, found {patience!r}")


def _dtypes(dtype: DtypeOption) -> CheckedDtype:
    """Checked, with dtypes in place of their names."""
    if not isinstance(dtype, Mapping):
        return _dtype(dtype)
    checked: dict[str, torch.dtype | str | None] = {}
    for pattern, value in dtype.items():
        if not isinstance(pattern, str):
            raise TypeError(f"a dtype mapping goes from fqn patterns to dtypes, found the key {pattern!r}")
        if isinstance(value, Mapping):
            raise TypeError(f"dtype[{pattern!r}] must be a torch.dtype, 'auto' or None")
        checked[pattern] = _dtype(value)
    return Patterns(checked)


def _dtype(dtype: object) -> torch.dtype | str | None:
    found = dtype
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            names = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
            floating = [name for name in names if getattr(torch, name).is_floating_point]
            near = difflib.get_close_matches(dtype, floating, cutoff=0.5)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"dtype {dtype!r} is not a dtype of torch; expected one, its name, or 'auto'{hint}")
    if isinstance(found, torch.dtype) and not found.is_floating_point:
        raise ValueError(f"dtype is for floating-point tensors; {found} is not a floating-point dtype")
    if not isinstance(found, torch.dtype | str | None):
        expected = "None, 'auto', a torch.dtype, the name of one, or a mapping of fqn patterns"
        raise TypeError(f"dtype must be {expected}, found {dtype!r}")
    return found


def _check_key_mapping(key_mapping: KeyMapping | None) -> None:
    if isinstance(key_mapping, Mapping):
        for pattern, replacement in key_mapping.items():
            if not isinstance(pattern, str) or not isinstance(replacement, str):
                hint = "; a callable drops a key by returning None" if replacement is None else ""
                raise TypeError(f"key_mapping maps patterns to strings, found {pattern!r}: {replacement!r}{hint}")
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"key_mapping: {pattern!r} is not a regular expression: {error}") from None
            try:
                compiled.sub(replacement, "")  # which looks at the replacement, whether or not it matches
            except (re.error, IndexError) as error:
                text = f"key_mapping: {replacement!r} is no replacement for {pattern!r}: {error}"
                raise ValueError(f"{text}; a backslash that is meant itself is written twice") from None
    elif key_mapping is not None and not callable(key_mapping):
        raise TypeError(f"key_mapping must be a mapping or a callable, found {key_mapping!r}")


def _device(option: str, device: DeviceOption) -> torch.device | None:
    if device is None:
        return None
    if not isinstance(device, torch.device | str | int):
        raise TypeError(f"{option} must be a torch.device, its name or its number, found {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{option}: {device!r} is no device of torch: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        text = "would return a module without values; weightlift.defer gives an unloaded one"
        raise ValueError(f"{option}='meta' {text}")
    return found


def _device_map(device_map: Mapping[str, DeviceOption] | None) -> Mapping[str, torch.device] | None:
    if device_map is None:
        return None
    if not isinstance(device_map, Mapping):
        raise TypeError(f"device_map must be a mapping of fqn prefixes to devices, found {device_map!r}")
    checked = {}
    for prefix, device in device_map.items():
        if not isinstance(prefix, str):
            raise TypeError(f"device_map goes from fqn prefixes to devices, found the prefix {prefix!r}")
        found = _device(f"device_map[{prefix!r}]", device)
        if found is None:
            raise ValueError(f"device_map[{prefix!r}] is None")
        checked[prefix] = found
    return checked
