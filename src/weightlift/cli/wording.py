"""The library's hints name options as Python has them; here they become the command line's."""

from __future__ import annotations

import ast
import re
import shlex

from weightlift.visible import visible

_FLAGS = {
    "strict=False": "--no-strict",
    "ignore_mismatched=True": "--ignore-mismatched",
    "copy=True": "--copy",
    "copy=False": "no --copy",
    "defer=False": "--no-defer",
    "leave within out": "leave --within out",
    "in device or device_map": "in --device",
    "key_mapping=lambda": "key_mapping=lambda",  # has no flag
    "key_mapping": "--rename",
    "memory_budget_bytes": "--memory-budget",
    "all are in `.problems`": "weightlift plan --json lists all",
    "all in `.problems`": "weightlift plan --json lists all",
    "trace:": "--trace:",
    "trace must be": "--trace must be",
}
_KNOWN = re.compile("|".join(rf"(?<![\w-]){re.escape(words)}(?!\w)" for words in _FLAGS))

# What can't be said there.
_FUNCTION = re.compile(r": (?=key_mapping=lambda)")

# A mapping that a hint gives ready to be passed.
_MAPPING = re.compile(r"""key_mapping=(\{(?:r?(?:"[^"]*"|'[^']*')[:,]? ?)+\})""")


# A part of what a trainer saved, likewise.
_WITHIN = re.compile(r"""open_checkpoint\(…, within=(\(.*?\)|'[^']*'|"[^"]*")\)""")


def as_flags(text: str) -> str:
    """A message in the command line's words. What has no flag stays as it is."""
    text = _WITHIN.sub(_within, _MAPPING.sub(_renames, _FUNCTION.sub(", which takes Python: ", text)))
    return _KNOWN.sub(lambda match: _FLAGS[match[0]], text)


def _within(match: re.Match[str]) -> str:
    try:
        names: str | tuple[str, ...] = ast.literal_eval(match[1])
    except (ValueError, SyntaxError):
        return match[0]
    names = (names,) if isinstance(names, str) else names
    if any(visible(name) != name for name in names):
        return match[0]
    return " ".join(f"--within {shlex.quote(name)}" for name in names)


def _renames(match: re.Match[str]) -> str:
    """``key_mapping={…}`` as a shell takes it."""
    try:
        pairs: dict[str, str] = ast.literal_eval(match[1])
    except (ValueError, SyntaxError):
        return match[0]
    if any(visible(text) != text for pair in pairs.items() for text in pair):
        return match[0]  # a shell's quotes keep no terminal from obeying
    return " ".join(f"--rename {shlex.quote(pattern)} {shlex.quote(name)}" for pattern, name in pairs.items())
