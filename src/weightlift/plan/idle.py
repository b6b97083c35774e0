"""Patterns of the options that match nothing: most often they are misspelt, and nothing else would tell."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from weightlift.options import LoadOptions
from weightlift.patterns import Patterns
from weightlift.plan.nearest import nearest_names


def idle_patterns(
    options: LoadOptions, idle_keys: Iterable[str], names: Sequence[str], modules: Iterable[str]
) -> Iterator[str]:
    """A text for every pattern that matches nothing. ``idle_keys`` are those of key_mapping; ``names`` are those of the
    module's tensors, ``modules`` those of the modules within."""
    for pattern in idle_keys:
        yield f"key_mapping[{pattern!r}] matches no key of the checkpoint"
    if isinstance(options.dtype, Patterns):
        used = {pattern for name in names for pattern in options.dtype.matching(name)}
        for pattern in options.dtype:
            if pattern not in used:
                yield f"dtype[{pattern!r}] matches no name of the module{_wider(pattern, names)}"
    if options.device_map is not None:
        known = {"", *names, *modules}
        for prefix in options.device_map:
            if prefix not in known:
                near = nearest_names(prefix, [*modules] or [*names])
                similar = f"; similar: {', '.join(near)}" if near else ""
                yield f"device_map[{prefix!r}] is no name of the module or of a part of it{similar}"


def _wider(pattern: str, names: Iterable[str]) -> str:
    """What may have been meant: a pattern is held against the whole name."""
    wider = f"*{pattern.strip('*')}*"
    if wider != pattern and any(fnmatch.fnmatchcase(name, wider) for name in names):
        return f", as a pattern stands for whole names; {wider!r} would match"
    return ""
