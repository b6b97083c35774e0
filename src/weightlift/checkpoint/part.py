"""Which part of an unpickled object is the state dict: the object itself, or a mapping within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightlift.checkpoint.dcp_metadata import UNFLATTENED, Item
from weightlift.checkpoint.torch_globals import Opaque, TensorRef
from weightlift.errors import CheckpointError, Problem

_MAX_DEPTH = 100
_MANY = 20


@dataclass(frozen=True, slots=True)
class Part:
    """``names`` lead to it, each to a mapping within the one before; what lies beside it may be anything.

    ``optional``: there may be no such, and then the object itself is the state dict; where there is, it may hold
    another of the name, which it is then.
    """

    names: tuple[str, ...] = ()
    optional: bool = False

    @classmethod
    def of(cls, within: str | Sequence[str] | None) -> Part:
        """What a user names. Raises TypeError for what is no name and no names."""
        if isinstance(within, str):
            return cls((within,))
        if within is not None and not isinstance(within, (tuple, list)):
            raise TypeError(f"within: expected a name or a tuple of names, found {within!r:.100}")
        names = tuple(within or ())
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"within: expected names, found {within!r:.100}")
        return cls(names)

    @property
    def is_amid_others(self) -> bool:
        """Whether the rest of the object is nobody's business."""
        return bool(self.names) and not self.optional

    def find(self, root: Any, file: Path | str) -> Any:
        """The part of ``root``, an object of ``file``. Raises `CheckpointError` where there is none."""
        if self.optional:
            return self._unwrapped(root)
        for at, name in enumerate(self.names):
            within = root.get(name) if isinstance(root, Mapping) else None
            if not isinstance(within, Mapping):
                raise CheckpointError("no such state dict", [self._absent(root, at, file)])
            root = within
        return root

    def _unwrapped(self, root: Any) -> Any:
        (name,) = self.names
        for _ in range(_MAX_DEPTH):
            if not isinstance(root, Mapping) or not isinstance(root.get(name), Mapping):
                break
            root = root[name]
        return root

    def _absent(self, root: Any, at: int, file: Path | str) -> Problem:
        where = f"given{Part(self.names[:at]).path}"
        found = f"{where} is {told(root)}"
        if isinstance(root, Mapping) and self.names[at] in root:
            found = f"given{Part(self.names[: at + 1]).path} is {told(root[self.names[at]])}"
        elif isinstance(root, Mapping):
            held = [key for key, value in root.items() if type(key) is str and isinstance(value, Mapping)]
            listed = ", ".join(f"{name!r:.100}" for name in held[:_MANY]) + (" …" if len(held) > _MANY else "")
            found = f"mappings under {listed}" if held else "no mapping within it"
        expected, hint = f"a mapping there, by {self.call}", None
        if isinstance(root, Mapping) and isinstance(value := root.get(self.names[at]), Item) and not value.is_tensor:
            hint = UNFLATTENED
        elif isinstance(root, Mapping) and self.names[at] not in root and any(map(_is_tensor, root.values())):
            shorter = Part(self.names[:at])
            hint = f"tensors are there already: {shorter.call if at else 'leave within out'}"
        elif len(dotted := self.names[at].split(".")) > 1 and _leads(dotted, root):
            names = (*self.names[:at], *dotted, *self.names[at + 1 :])
            hint = f"names within each other are a tuple: {Part(names).call}"
        return Problem("holds no such mapping", file=file, expected=expected, found=found, hint=hint)

    @property
    def path(self) -> str:
        """How Python comes from the object to it."""
        return "".join(f"[{name!r}]" for name in self.names)

    @property
    def call(self) -> str:
        """How it is asked for."""
        return f"open_checkpoint(…, within={(self.names[0] if len(self.names) == 1 else self.names)!r})"


def _leads(names: Sequence[str], root: Any) -> bool:
    """Whether each name is there within the one before."""
    for name in names:
        if not isinstance(root, Mapping) or name not in root:
            return False
        root = root[name]
    return True


def told(value: Any) -> str:
    """What a value of a pickle is, for an error."""
    if isinstance(value, Opaque):
        return value.what
    if _is_tensor(value):
        return "a tensor"
    if isinstance(value, Item):
        return "a value"
    return "None" if value is None else f"a {type(value).__name__}"


def _is_tensor(value: Any) -> bool:
    return value.is_tensor if isinstance(value, Item) else isinstance(value, (TensorRef, torch.Tensor))


WHOLE = Part()
"""The object itself."""
