"""Writing one safetensors file: a header, then every tensor's bytes, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from weightlift import dtypes
from weightlift.errors import Problem, TransferError

# As torch's own memory is; the format wants 8. Kernels may sum in another order where a tensor lies otherwise, and a
# mapped one lies as in the file. So those that fill up whole units come first.
_ALIGN_BYTES = 64
_LENGTH_BYTES = 8  # before the header
_CALL_BYTES = 64 << 20


class FileLayout(NamedTuple):
    """The beginning of a file, its header's length included, and each tensor's bytes behind that, in their order."""

    header: bytes
    spans: dict[str, tuple[int, int]]

    @property
    def header_bytes(self) -> int:
        """As the format counts them."""
        return len(self.header) - _LENGTH_BYTES


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], layout: FileLayout, *, hashed: bool, mode: int | None
) -> str | None:
    """Write a new file, flushed to the disk, with the permissions ``mode`` (None: the umask's); its sha256 when
    ``hashed``. ``layout``: that of its tensors, by `laid_out`.

    The file must not exist. Tensors are plain, strided and of dtypes that the format has. Tensors of another device
    pass through the CPU one at a time. Raises `TransferError` with key and byte range, the cause chained.
    """
    header, spans = layout
    state = hashlib.sha256(usedforsecurity=False) if hashed else None
    key, start, end = None, 0, len(header)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            permit(fd, mode)
            _write(fd, memoryview(header), state)
            for key, span in spans.items():
                start, end = (len(header) + at for at in span)
                host = tensors[key].detach().resolve_conj().resolve_neg().to("cpu").contiguous()
                _write(fd, _bytes(host), state)
            os.fsync(fd)
        finally:
            os.close(fd)
    except (OSError, RuntimeError) as error:
        hint = "the files that were there are as they were"
        problem = Problem(f"writing failed: {error}", key=key, file=path, start=start, end=end, hint=hint)
        raise TransferError("saving failed", [problem]) from error
    return None if state is None else state.hexdigest()


def _place(name: str, tensor: torch.Tensor) -> tuple[bool, int, str]:
    """Where a tensor stands among the others."""
    return tensor.numel() * tensor.element_size() % _ALIGN_BYTES != 0, -tensor.element_size(), name


def permit(fd: int, mode: int | None) -> None:
    """Give an open file its permissions, where the system has such and lets them be set."""
    if mode is not None and hasattr(os, "fchmod"):
        with contextlib.suppress(OSError):
            os.fchmod(fd, mode)


def laid_out(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileLayout:
    """How a file of these tensors is to be."""
    names = sorted(tensors, key=lambda name: _place(name, tensors[name]))
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    spans: dict[str, tuple[int, int]] = {}
    position = 0
    for name in names:
        tensor = tensors[name]
        kind = dtypes.safetensors_name(tensor.dtype)
        assert kind is not None, (name, tensor.dtype)
        shape = list(tensor.shape)
        if kind == "F4":
            shape[-1] *= 2  # torch counts pairs
        spans[name] = (position, position + tensor.numel() * tensor.element_size())
        position = spans[name][1]
        described[name] = {"dtype": kind, "shape": shape, "data_offsets": list(spans[name])}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGN_BYTES)
    return FileLayout(struct.pack("<Q", len(text)) + text, spans)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which the caller keeps alive."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def _write(fd: int, view: memoryview, state: hashlib._Hash | None) -> None:
    done = 0
    while done < len(view):
        part = view[done : done + _CALL_BYTES]
        count = os.write(fd, part)
        if state is not None:
            state.update(part[:count])
        done += count
