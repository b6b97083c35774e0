"""What Transformers' loads and Diffusers' refuse alike, nearly all of it to leave it to the library (`NotNative`)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch

from weightlift.errors import CheckpointError
from weightlift.integrations.exclusive import NotNative

_KEPT = "its own library puts them into the model as they are"


def refuse_foreign(state_dict: Mapping[str, Any]) -> None:
    """Raise `NotNative` for a mapping with tensors of another class than torch's own."""
    for key, value in state_dict.items():
        if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise NotNative(f"{key}: a {type(value).__name__} in the state dict", _KEPT)


def refuse_allowed(error: CheckpointError) -> None:
    """Raise `NotNative` where a pickle was refused for the name of something that the program has told torch to allow
    (``torch.serialization.add_safe_globals``, as libraries of quantised tensors do): torch loads that with
    ``weights_only=True``."""
    for problem in error.problems:
        if problem.found in _allowed():
            raise NotNative(f"a pickle that holds {problem.found}", _KEPT)


def _allowed() -> set[str]:
    """The names under which pickles may hold what was allowed."""
    given: list[Any] = torch.serialization.get_safe_globals()
    return {item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in given}


def refuse_meta(places: Any) -> None:
    """Raise `NotNative` for a ``device_map``, or a device, that leaves something on the meta device: nothing is read
    for that, and a model without values is not what is planned here."""
    values = places.values() if isinstance(places, Mapping) else (places,)
    if any(str(value).partition(":")[0] == "meta" for value in values):
        raise NotNative("the meta device", "the model is to have no values there")


def require_names(device_map: Any) -> None:
    """Raise TypeError for a mapping with keys that are no names of modules."""
    others = [key for key in device_map if not isinstance(key, str)] if isinstance(device_map, Mapping) else []
    if others:
        found = ", ".join(f"{key!r} (a {type(key).__name__})" for key in others)
        raise TypeError(
            f"device_map: expected names of modules as keys, found {found}; map names to devices, as in "
            '{"": 0} for the whole model or {"model.layers.0": "cpu", …} for its parts'
        )


def override_of(cls: Any, names: Iterable[str], known: Container[str]) -> str | None:
    """The first of a class's methods ``names`` that is defined outside of the packages ``known``, as ``Owner.name``."""
    for name in names:
        owner = next((item for item in cls.__mro__ if name in item.__dict__), None)
        if owner is not None and owner.__module__.partition(".")[0] not in known:
            return f"{owner.__name__}.{name}"
    return None
