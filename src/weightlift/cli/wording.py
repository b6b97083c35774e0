"""The library's hints name options as Python has them; here they become the command line's."""

from __future__ import annotations

import re

_FLAGS = {
    "strict=False": "--no-strict",
    "ignore_mismatched=True": "--ignore-mismatched",
    "copy=True": "--copy",
    "copy=False": "no --copy",
    "defer=False": "--no-defer",
    "drop one of the two keys: key_mapping=lambda key: None for it": "drop one of the two keys, which takes Python: "
    "key_mapping=lambda key: None for it",
    "in device or device_map": "in --device",
    "key_mapping": "--rename",
    "memory_budget_bytes": "--memory-budget",
}
_KNOWN = re.compile("|".join(rf"(?<!\w){re.escape(words)}(?!\w)" for words in _FLAGS))


def as_flags(text: str) -> str:
    """A message in the command line's words. What has no flag stays as it is."""
    return _KNOWN.sub(lambda match: _FLAGS[match[0]], text)
