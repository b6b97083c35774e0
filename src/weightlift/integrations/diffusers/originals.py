"""The methods of Diffusers as they are while `weightlift.install` has not replaced them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def original(owner: Any, name: str) -> Any:
    """The method of Diffusers' own, a classmethod object, whether or not ours stands in its place."""
    found = owner.__dict__[name]
    return getattr(found.__func__, "replaced", found)


def validated(theirs: Any) -> Callable[[Any], Any]:
    """Has huggingface_hub look at a function's arguments, as it does for the method that this stands for; what it warns
    of is that method's."""
    from huggingface_hub.utils._validators import validate_hf_hub_args

    def wrap(function: Any) -> Any:
        function.__name__ = theirs.__func__.__name__
        return validate_hf_hub_args(function)

    return wrap
