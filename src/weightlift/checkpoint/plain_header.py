"""The short way through a safetensors header in which nothing is unusual: one pass, few objects.

`weightlift.checkpoint.safetensors` has the rules and says what is wrong with a header. This module says that nothing
is, or that it does not know: every header that it accepts is one that those rules accept, with the same entries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weightlift import dtypes
from weightlift.checkpoint.entry import TensorEntry

_METADATA = "__metadata__"
# Bytes of an element where that is a whole number, and torch's shape is the file's.
_WIDTHS = {name: bits // 8 for name, bits in dtypes.BITS.items() if bits % 8 == 0 and name in dtypes.TORCH}
# Escapes may hide surrogates, and -0 is no integer to the official parser.
_UNUSUAL = ("\\u", "-0")
_INT = {int}  # and not bool, which equals one


class _UnusualHeader(Exception):
    """Something that the rules have to look at."""


def plain_entries(
    text: str, path: Path, data: int, end: int
) -> tuple[dict[str, str], tuple[TensorEntry, ...]] | None:
    """The metadata and the entries of a header; None where there is anything that has to be looked at more closely.

    The tensors' bytes begin at ``data`` and must fill the file up to ``end``, in the order of the header.
    """
    if any(mark in text for mark in _UNUSUAL):
        return None
    try:
        header = json.loads(text, object_pairs_hook=_object)
    except (_UnusualHeader, ValueError, RecursionError):
        return None
    if type(header) is not dict:
        return None
    metadata = header.pop(_METADATA, {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        return None
    entries = _entries(header.items(), path, data, end)
    return None if entries is None else (metadata, entries)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A tensor as a tuple: in the tens of thousands, dicts and lists would keep the garbage collector busy."""
    if len(pairs) == 3:
        (first, dtype), (second, shape), (third, offsets) = pairs
        if first == "dtype" and second == "shape" and third == "data_offsets":
            lists = type(shape) is list and type(offsets) is list and len(offsets) == 2
            if lists and not set(map(type, shape)) - _INT:
                return dtype, tuple(shape), *offsets
            raise _UnusualHeader
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _UnusualHeader
    return made


def _entries(items: Iterable[tuple[str, Any]], path: Path, data: int, end: int) -> tuple[TensorEntry, ...] | None:
    found = []
    position = data
    kinds: dict[tuple[Any, ...], tuple[Any, tuple[int, ...], int] | None] = {}  # few kinds of very many tensors
    for key, value in items:
        if type(value) is not tuple:
            return None
        name, shape, start, stop = value
        if type(start) is not int or type(stop) is not int or start + data != position:
            return None
        try:
            kind = kinds[name, shape]
        except KeyError:
            kind = kinds[name, shape] = _kind(name, shape)
        except TypeError:  # a list or an object for a name
            return None
        if kind is None or stop - start != kind[2]:
            return None
        position = data + stop
        found.append(TensorEntry(key, kind[1], kind[0], path, data + start, position))
    return tuple(found) if position == end else None


def _kind(name: Any, shape: tuple[Any, ...]) -> tuple[Any, tuple[int, ...], int] | None:
    """(torch's dtype, shape, bytes), where nothing is unusual about them."""
    width = _WIDTHS.get(name) if type(name) is str else None
    if width is None or dtypes.torch_shape(name, shape) != shape:
        return None
    for extent in shape:
        if extent < 1:
            return None
        width *= extent
    return dtypes.TORCH[name], shape, width
