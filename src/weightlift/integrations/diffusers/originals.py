"""The methods of Diffusers as they are while `weightlift.install` has not replaced them."""

from __future__ import annotations

from typing import Any


def original(owner: Any, name: str) -> Any:
    """The method of Diffusers' own, a classmethod object, whether or not ours stands in its place."""
    found = owner.__dict__[name]
    return getattr(found.__func__, "replaced", found)
