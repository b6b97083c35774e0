"""Finding what a class overrides of the steps by which its library loads it."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any


def override_of(cls: Any, names: Iterable[str], known: Container[str]) -> str | None:
    """The first of a class's methods ``names`` that is defined outside of the packages ``known``, as ``Owner.name``."""
    for name in names:
        owner = next((item for item in cls.__mro__ if name in item.__dict__), None)
        if owner is not None and owner.__module__.partition(".")[0] not in known:
            return f"{owner.__name__}.{name}"
    return None
