"""`Checkpoint`: a mapping from keys to where their tensors lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from weightlift.checkpoint.entry import ShardFile, TensorEntry, nbytes_of
from weightlift.checkpoint.reader import read_whole

_NONE: Mapping[str, Any] = MappingProxyType({})


class Checkpoint(Mapping[str, TensorEntry]):
    """What `open_checkpoint` found: every key's shape, dtype, file and byte range. Headers only; no file stays open.

    Immutable, and safe to use from any number of threads at once. Keys come in the order of the files, and within a
    file in the order of its header. It can be pickled for another process: of files without, of a mapping with its
    tensors.
    """

    __slots__ = (
        "_by_path", "_entries", "_extras", "_files", "_index", "_metadata", "_source", "_tensors", "_total",
        "_versions",
    )  # fmt: skip

    def __init__(
        self,
        source: str,
        entries: Mapping[str, TensorEntry],
        *,
        files: tuple[ShardFile, ...] = (),
        extras: Mapping[str, object] = _NONE,
        tensors: Mapping[str, torch.Tensor] = _NONE,
        state_dict_metadata: Mapping[str, Mapping[str, object]] | None = None,
        index: Path | None = None,
    ) -> None:
        self._source = source
        self._entries = MappingProxyType(dict(entries))
        self._files = files
        self._index = index
        self._by_path = {file.path: file for file in files}
        self._tensors = MappingProxyType(dict(tensors))
        self._extras: Mapping[str, object] = (
            _Extras(dict(extras), self._by_path) if files else MappingProxyType(dict(extras))
        )
        self._versions = state_dict_metadata
        merged: dict[str, str] = {}
        for file in files:
            merged = {**file.metadata, **merged}
        self._metadata = MappingProxyType(merged)
        self._total = sum([nbytes_of(entry) for entry in entries.values()])

    def __reduce__(self) -> tuple[object, ...]:
        # Proxies can't be pickled.
        extras = self._extras.values_by_key if isinstance(self._extras, _Extras) else dict(self._extras)
        versions = None if self._versions is None else {name: dict(item) for name, item in self._versions.items()}
        parts = self._source, dict(self._entries), self._files, extras, dict(self._tensors), versions, self._index
        return _checkpoint, parts

    @property
    def source(self) -> str:
        """What it was opened from: an absolute path, a hub id, or ``<mapping>``."""
        return self._source

    @property
    def files(self) -> tuple[ShardFile, ...]:
        """The files it is made of, those of an index sorted by name; none for a mapping."""
        return self._files

    @property
    def index(self) -> Path | None:
        """The index that named the files, if one did."""
        return self._index

    @property
    def metadata(self) -> Mapping[str, str]:
        """The ``__metadata__`` of the safetensors files; where they differ, the first file's value."""
        return self._metadata

    @property
    def extras(self) -> Mapping[str, object]:
        """The values of a state dict that are not tensors (``…_extra_state``).

        Of a file, each access makes a new copy and reads the tensors within it.
        """
        return self._extras

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors of a mapping source, themselves; empty for files."""
        return self._tensors

    @property
    def state_dict_metadata(self) -> Mapping[str, Mapping[str, object]] | None:
        """The ``_metadata`` of a state dict (module versions), read-only; None when there is none."""
        return self._versions

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors once read; tied ones count once for each key."""
        return self._total

    def read(self, key: str) -> torch.Tensor:
        """The tensor of ``key``, row-major, with memory of its own; on the CPU, of a mapping on its own device.

        Raises KeyError for a key that is not here, `CheckpointChanged` when the file is no longer the one that was
        opened, `CheckpointError` with file and range when it can't be read. Thread-safe.
        """
        entry = self._entries[key]
        if entry.file is None and not entry.chunks:
            return self._tensors[key].detach().clone(memory_format=torch.contiguous_format)
        return read_whole(self._by_path, entry)

    def __getitem__(self, key: str) -> TensorEntry:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __repr__(self) -> str:
        files = f", {len(self._files)} file{'s' * (len(self._files) != 1)}" if self._files else ""
        extras = f", {len(self._extras)} other values" if self._extras else ""
        count = len(self._entries)
        return f"<Checkpoint {self._source}: {count} tensor{'s' * (count != 1)}{files}, {self._total:,} bytes{extras}>"


def _checkpoint(
    source: str,
    entries: dict[str, TensorEntry],
    files: tuple[ShardFile, ...],
    extras: dict[str, object],
    tensors: dict[str, torch.Tensor],
    versions: dict[str, dict[str, object]] | None,
    index: Path | None,
) -> Checkpoint:
    frozen = None if versions is None else {name: MappingProxyType(item) for name, item in versions.items()}
    return Checkpoint(
        source,
        entries,
        files=files,
        extras=extras,
        tensors=tensors,
        state_dict_metadata=None if frozen is None else MappingProxyType(frozen),
        index=index,
    )


class _Extras(Mapping[str, object]):
    """Non-tensor values of a pickle, whose nested tensors are read on access; ``values_by_key`` has them as records."""

    __slots__ = ("_files", "values_by_key")

    def __init__(self, values: dict[str, object], files: Mapping[Path, ShardFile]) -> None:
        self.values_by_key = values
        self._files = files

    def __getitem__(self, key: str) -> object:
        return self._copy(self.values_by_key[key], {})

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)

    def __contains__(self, key: object) -> bool:
        return key in self.values_by_key

    def __repr__(self) -> str:
        return f"<extras {list(self.values_by_key)}>"

    def _copy(self, value: Any, seen: dict[int, Any]) -> Any:
        if id(value) in seen:
            return seen[id(value)]
        made: Any = value
        if isinstance(value, TensorEntry):
            made = read_whole(self._files, value)
        elif isinstance(value, dict):
            made = seen[id(value)] = type(value)()
            for name, item in value.items():
                made[name] = self._copy(item, seen)
        elif isinstance(value, list):
            made = seen[id(value)] = []
            made.extend(self._copy(item, seen) for item in value)
        elif type(value) is tuple:
            made = tuple(self._copy(item, seen) for item in value)
        elif isinstance(value, (set, bytearray)):
            made = type(value)(value)
        seen[id(value)] = made
        return made
