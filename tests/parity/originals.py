"""Checkpoints in the layouts that models were published in, made of tiny ones by turning Diffusers' conversions round.

A conversion is run on pieces instead of tensors, which say of what key, and of what part of it, each name is made. Keys
that it asks for by name give themselves away so; those that it renames by tables are searched for: the tables' pairs,
read from its code, are applied backwards until the conversion gives the wanted name.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_EXTENT = 3 * 3072 + 4 * 3072
_DEPTH = 6
_TRIALS = 400


@dataclass(frozen=True)
class Piece:
    """What a conversion makes of the tensor of one key."""

    key: str
    how: str = "whole"  # or: part, swapped, indexed, squeezed, shaped
    number: int = 0
    sizes: tuple[int, ...] = ()  # of all parts; 0 where they are equal
    index: Any = None

    shape = (_EXTENT,) * 5
    ndim = 5

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def parts(self, sizes: Sequence[int]) -> tuple[Piece, ...]:
        assert self.how == "whole", self
        return tuple(Piece(self.key, "part", number, tuple(sizes)) for number in range(len(sizes)))

    def chunk(self, count: int, dim: int = 0) -> tuple[Piece, ...]:
        return self.parts((0,) * count)

    def squeeze(self) -> Piece:
        return self if self.how == "part" else Piece(self.key, "squeezed")

    def reshape(self, *_: int) -> Piece:
        return Piece(self.key, "shaped")

    def __getitem__(self, index: Any) -> Piece:
        if isinstance(index, slice):
            return self.parts((0, 0))[0 if index.start is None else 1]
        return Piece(self.key, "indexed", index=tuple(item for item in index if isinstance(item, int)))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func is torch.chunk:
            return args[0].chunk(args[1])
        if func is torch.split:
            return args[0].parts(args[1])
        if func is torch.cat:
            pieces = args[0]
            if len(pieces) == 1:
                return pieces[0]
            assert [piece.number for piece in pieces] == [1, 0], pieces
            return Piece(pieces[0].key, "swapped")
        return NotImplemented


class _Asked(dict[str, Any]):
    """A state dict that has whatever it is asked for by name, and remembers that."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __missing__(self, key: str) -> Piece:
        self.asked.add(key)
        return Piece(key)

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            return super().pop(key)
        self.asked.add(key)
        return Piece(key)


def original_state_dict(
    state: Mapping[str, torch.Tensor],
    convert: Callable[..., Any],
    config: Mapping[str, Any],
    *,
    seeds: Sequence[str] = (),
    pairs: Sequence[tuple[str, str]] = (),
    prefixes: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """A state dict that ``convert`` turns into ``state``.

    ``seeds`` are keys that it looks for before it asks by name, ``pairs`` further ones of its code's renamings,
    ``prefixes`` what keys may begin with. Raises AssertionError where a name has none.
    """
    made: dict[str, Piece] = {}
    asked: set[str] = set()
    given = _Asked({key: Piece(key) for key in seeds})
    try:
        made = dict(convert(checkpoint=given, config=config))
        asked = given.asked | set(seeds)
    except Exception:
        made, asked = {}, set()
    found = {name: piece for name, piece in made.items() if name in state}
    inverse = _Inverse(convert, config, seeds, (*_pairs(convert), *pairs), prefixes)
    for name in state:
        if name not in found or found[name] == Piece(name):
            piece = inverse.search(name) or found.get(name)
            assert piece is not None, f"no original key for {name}"
            found[name] = piece
    return _filled(state, found, {*asked, *(piece.key for piece in made.values() if piece.key in asked)}, made)


def _filled(
    state: Mapping[str, torch.Tensor], found: Mapping[str, Piece], asked: set[str], made: Mapping[str, Piece]
) -> dict[str, torch.Tensor]:
    by_key: dict[str, dict[int, tuple[Piece, str]]] = {}
    for name, piece in found.items():
        by_key.setdefault(piece.key, {})[piece.number] = (piece, name)
    result = {key: _whole(parts, state) for key, parts in by_key.items()}
    for piece in made.values():  # of what the model has no name for: something that can be cut alike
        if piece.key not in result:
            result[piece.key] = torch.zeros(sum(size or 1 for size in piece.sizes) or 2, 1)
    for key in asked:
        result.setdefault(key, torch.zeros(2, 1))
    return result


def _whole(parts: Mapping[int, tuple[Piece, str]], state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    piece, name = next(iter(parts.values()))
    value = state[name]
    if piece.how == "part":
        values = []
        for number, size in enumerate(piece.sizes):
            known = parts.get(number)
            values.append(value.new_zeros(size or 1, *value.shape[1:]) if known is None else state[known[1]])
        return torch.cat(values)
    if piece.how == "swapped":
        return torch.cat(tuple(reversed(value.chunk(2))))
    if piece.how == "shaped":
        return value.reshape(-1)
    if piece.how == "squeezed":
        return value[..., None, None]
    if piece.how == "indexed":
        for dim in (0, 2, 3):
            value = value.unsqueeze(dim)
        return value
    return value.clone()


class _Inverse:
    """Looks for the keys of which a conversion makes given names."""

    def __init__(
        self,
        convert: Callable[..., Any],
        config: Mapping[str, Any],
        seeds: Sequence[str],
        pairs: Sequence[tuple[str, str]],
        prefixes: Sequence[str],
    ) -> None:
        self._convert = convert
        self._config = config
        self._seeds = seeds
        self._pairs = tuple(dict.fromkeys((old, new) for old, new in pairs if new and old != new))
        self._prefixes = prefixes or ("",)

    def search(self, name: str) -> Piece | None:
        """The piece that ``name`` is made of; of several the one that is the most unlike it."""
        best: Piece | None = None
        level, seen = [name], {name}
        for _ in range(_DEPTH):
            for candidate in level:
                best = self._tried(candidate, name) or best
            level = self._before(level, seen)
            if len(seen) > _TRIALS:
                break
        return best

    def _before(self, level: Sequence[str], seen: set[str]) -> list[str]:
        found = []
        for candidate in level:
            for old, new in self._pairs:
                if new in candidate:
                    earlier = candidate.replace(new, old)
                    if earlier not in seen:
                        seen.add(earlier)
                        found.append(earlier)
        return found

    def _tried(self, key: str, name: str) -> Piece | None:
        for prefix in self._prefixes:
            given = {seed: Piece(seed) for seed in self._seeds}
            given[prefix + key] = Piece(prefix + key)
            try:
                made = self._convert(checkpoint=given, config=self._config).get(name)
            except Exception:
                continue
            if isinstance(made, Piece) and made.key == prefix + key:
                return made
        return None


@functools.cache
def _pairs(convert: Callable[..., Any]) -> tuple[tuple[str, str], ...]:
    """The renamings that stand in a function's code: tables of strings, and calls of ``replace``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(convert)))
    except (OSError, SyntaxError):
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            found += [
                (key.value, value.value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
                if isinstance(key.value, str) and isinstance(value.value, str)
            ]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "replace" and len(node.args) >= 2:
            texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
            if len(texts) == 2:
                found.append((texts[0], texts[1]))
    return tuple(found)
