"""Names that a reader may have meant: for error messages only."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_COMPARED = 2000


def nearest_names(name: str, candidates: Sequence[str]) -> list[str]:
    """Up to three of ``candidates`` that look like ``name``; nothing when there are too many to compare."""
    if len(candidates) > _COMPARED:
        return []
    tail = name.rsplit(".", 2)[-2:]
    endings = [item for item in candidates if item.rsplit(".", 2)[-2:] == tail]
    return difflib.get_close_matches(name, endings or candidates, n=3, cutoff=0.6)
