"""What a checkpoint calls its tensors, as text that can be shown: its names may hold any character."""

from __future__ import annotations

import unicodedata


def visible(text: str, *, keep: str = "") -> str:
    """The text with escapes for what a terminal would obey and a reader not see: control characters, ends of lines,
    marks that turn the direction of writing, halves of surrogate pairs. Characters of ``keep`` stay.
    """
    if text.isprintable():
        return text
    return "".join(
        item
        if item.isprintable() or item in keep or unicodedata.category(item) == "Zs"
        else item.encode("unicode_escape").decode()
        for item in text
    )
