"""The end of a load: extra state and post hooks, in the order and with the lists of ``load_state_dict``.

Runs in the caller's own modes: this is the module's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weightlift.errors import Problem, TransferError
from weightlift.plan.records import Decisions

_IncompatibleKeys: Any = torch.nn.modules.module._IncompatibleKeys


def finish(module: nn.Module, decisions: Decisions, extras: Mapping[str, Any], *, post_hooks: bool = True) -> None:
    """Give every module its extra state, and run the post hooks. ``extras``: extra-state name → value.

    Raises TransferError, with the module's name, when a ``set_extra_state`` fails; what a post hook raises comes
    through.
    """
    _Finish(decisions, extras, post_hooks).visit(module, "")


class _Finish:
    """One walk. Post hooks share two lists, which grow as the walk proceeds and which they may change."""

    def __init__(self, decisions: Decisions, extras: Mapping[str, Any], post_hooks: bool) -> None:
        self._extras = extras
        self._post_hooks = post_hooks
        self._missing = _by_prefix(decisions.announced_missing)
        self._unexpected = _by_prefix(decisions.announced_unexpected)
        self._keys = _IncompatibleKeys([], [])

    def visit(self, module: nn.Module, prefix: str) -> None:
        """A module, its children, then its post hooks."""
        name = f"{prefix}_extra_state"
        if name in self._extras:
            _set_extra_state(module, prefix, self._extras[name])
        self._announce(prefix[:-1], module)
        for child_name, child in module._modules.items():
            if child is not None:
                self.visit(child, f"{prefix}{child_name}.")
        for hook in list(module._load_state_dict_post_hooks.values()) if self._post_hooks else ():
            if hook(module, self._keys) is not None:
                raise AssertionError("a load_state_dict post hook must return None, and change the keys in place")

    def _announce(self, fqn: str, module: nn.Module) -> None:
        """Add the names that torch would find here: this module's own, and those below it that no child will find."""
        for names, keys in ((self._missing, self._keys.missing_keys), (self._unexpected, self._keys.unexpected_keys)):
            found = names.pop(fqn, [])
            start = f"{fqn}." if fqn else ""
            for prefix in [item for item in names if item.startswith(start)]:
                if module._modules.get(prefix[len(start) :].partition(".")[0]) is None:
                    found += names.pop(prefix)
            keys += [name for _, name in sorted(found)]


def _by_prefix(names: tuple[str, ...]) -> dict[str, list[tuple[int, str]]]:
    """The names directly below each prefix, with their places among all."""
    found: dict[str, list[tuple[int, str]]] = {}
    for place, name in enumerate(names):
        found.setdefault(name.rpartition(".")[0], []).append((place, name))
    return found


def _set_extra_state(module: nn.Module, prefix: str, state: Any) -> None:
    try:
        module.set_extra_state(state)
    except Exception as error:
        problem = Problem(
            f"set_extra_state of {type(module).__qualname__} raised {type(error).__name__}: {error}",
            fqn=prefix[:-1] or "the module itself",
            key=f"{prefix}_extra_state",
        )
        raise TransferError("extra state could not be set; the tensors have been loaded", [problem]) from error
