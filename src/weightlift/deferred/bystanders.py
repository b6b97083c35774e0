"""What another thread may have replaced while a module is built in this one: accelerate's ``init_empty_weights``.

While any thread is within it, and for good once two were at a time (Diffusers' own loading uses it), every
``nn.Module.register_parameter`` of the process wraps the parameter in another one, which it moves to ``meta``.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import nn


class Bystanders:
    """Keeps the parameters of one construction where they are, and puts them back in the place of the wrappers."""

    def __init__(self) -> None:
        self._last: tuple[nn.Module, str, nn.Parameter] | None = None  # whose wrapper is still to be seen
        self._wrapped: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by a wrapper's id: it, and what it is around

    def stays(self, frame: FrameType, args: Any, kwargs: Any) -> Any:
        """Asked about ``parameter.to(device)``: NotImplemented where it isn't accelerate that moves it."""
        if (
            frame.f_code.co_name != "register_empty_parameter"
            or frame.f_globals.get("__name__") != "accelerate.big_modeling"
        ):
            return NotImplemented
        self._look()
        given = args[0]
        _, original = self._wrapped.get(id(given), (given, given))  # tied, or wrapped twice
        self._last = frame.f_locals["module"], frame.f_locals["name"], original
        return given

    def _look(self) -> None:
        """Note the wrapper that was made last."""
        if self._last is None:
            return
        module, name, original = self._last
        self._last = None
        wrapper = module._parameters.get(name)
        if wrapper is not None and wrapper is not original:
            self._wrapped[id(wrapper)] = wrapper, original

    def undo(self, module: nn.Module) -> None:
        """Give the module its own parameters, so that ties are ties. Called outside of every mode, once it is built."""
        self._look()
        if not self._wrapped:
            return
        for part in module.modules():
            for name, parameter in part._parameters.items():
                wrapper, original = self._wrapped.get(id(parameter), (None, None))
                if wrapper is not None and original is not None:
                    _give(original, wrapper)
                    part._parameters[name] = original
        self._wrapped.clear()


def _give(original: nn.Parameter, wrapper: nn.Parameter) -> None:
    """What the constructor did to the wrapper since."""
    original.data = wrapper.data
    original.requires_grad_(wrapper.requires_grad)
    original.__dict__.update(wrapper.__dict__)
    original.__dict__.pop("requires_grad", None)  # accelerate keeps it there
