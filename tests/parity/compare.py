"""Loading one saved model both ways, and what differs."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from weightlift.integrations.transformers.model import ORIGINAL, load_pretrained

DTYPES = (torch.float32, torch.bfloat16)


class FellBack(AssertionError):
    """A load that should have been native was left to Transformers."""


class _Watch(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def native_only() -> Iterator[None]:
    """Raise `FellBack` when a load within was not native."""
    logger, watch = logging.getLogger("weightlift"), _Watch()
    level = logger.level
    logger.addHandler(watch)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(watch)
        logger.setLevel(level)
    left = [message for message in watch.messages if "by its own library" in message]
    if left:
        raise FellBack(left[0])


def save_in_two(model: Any, folder: Path) -> None:
    """``save_pretrained`` so that, where it can, it writes two shard files."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=max(1000, int(total * 0.6)))


def both(cls: Any, folder: Path, **options: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(model, loading info) by weightlift, and by Transformers. A poisoned allocator can't be had, so what Transformers
    leaves uninitialised differs by chance."""
    torch.manual_seed(0)
    theirs = ORIGINAL.__func__(cls, folder, output_loading_info=True, **options)
    with native_only():
        ours = load_pretrained(cls, folder, (), {"output_loading_info": True, **options})
    return ours, theirs


def named(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, tied names repeated."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def in_each_dtype(
    load: Callable[..., Any], cls: Any, folder: Path, same_info: Callable[[Any, Any], bool] = operator.eq
) -> list[str]:
    """What differs between the models, and the loading infos, that ``load`` makes of a folder for each of `DTYPES`."""
    found = []
    for dtype in DTYPES:
        (ours, info), (theirs, expected) = load(cls, folder, dtype=dtype)
        found += [f"{dtype}: {item}" for item in differences(ours, theirs)]
        if not same_info(info, expected):
            found.append(f"{dtype}: loading info {info} for {expected}")
    return found


def differences(ours: Any, theirs: Any, *, values: bool = True) -> list[str]:
    """What differs between two models: classes, names, values, dtypes, devices, strides, ties, flags, configuration."""
    mine, other = named(ours), named(theirs)
    found = [f"only one has {name}" for name in sorted(set(mine) ^ set(other))]
    if list(mine) != list(other):
        found.append("order of names")
    if type(ours) is not type(theirs):
        found.append(f"a {type(ours).__name__} for a {type(theirs).__name__}")
    for name in mine.keys() & other.keys():
        found += [f"{name}: {item}" for item in _tensor_differences(mine[name], other[name], values)]
    if _ties(mine) != _ties(other):
        found.append(f"ties: {_ties(mine)} for {_ties(other)}")
    flags = [(name, module.training) for name, module in ours.named_modules()]
    if flags != [(name, module.training) for name, module in theirs.named_modules()]:
        found.append("training flags")
    return [*found, *settings(ours, theirs)] + [
        f"{name}: {getattr(ours, name, None)} for {getattr(theirs, name, None)}"
        for name in ("all_tied_weights_keys", "_keep_in_fp32_modules", "_no_split_modules")
        if getattr(ours, name, None) != getattr(theirs, name, None)
    ]


def _tensor_differences(a: torch.Tensor, b: torch.Tensor, values: bool) -> list[str]:
    found = [
        f"{what} {getattr(a, what)} for {getattr(b, what)}"
        for what in ("dtype", "shape", "requires_grad", "device", "is_leaf")
        if getattr(a, what) != getattr(b, what)
    ]
    if type(a) is not type(b):
        found.append(f"a {type(a).__name__} for a {type(b).__name__}")
    if values and a.dtype == b.dtype and a.shape == b.shape and not b.is_meta and not _equal(a, b):
        found.append("values")
    if _strides(a) != _strides(b):
        found.append(f"strides {a.stride()} for {b.stride()}")
    return found


def _strides(tensor: torch.Tensor) -> list[int]:
    """Those that say where a value is."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1] if tensor.numel() else []


def settings(ours: Any, theirs: Any) -> list[str]:
    """What differs between the configurations of two models, schedulers or tokenizers."""
    if not hasattr(theirs, "config"):
        return []
    a, b = (item.config.to_dict() if hasattr(item.config, "to_dict") else dict(item.config) for item in (ours, theirs))
    names = sorted(a.keys() | b.keys())
    return [f"configuration: {name}: {a.get(name)} for {b.get(name)}" for name in names if a.get(name) != b.get(name)]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.numel() == 0:
        return True
    carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if carrier is None or a.dtype.is_complex:
        return torch.equal(torch.view_as_real(a), torch.view_as_real(b))
    return torch.equal(a.detach().contiguous().view(carrier), b.detach().contiguous().view(carrier))


def _ties(tensors: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}
