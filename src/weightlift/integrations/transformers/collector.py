"""The collector behind Transformers' own ``output_hidden_states=True``, as `weightlift.install` puts it in place.

It imports nothing of Transformers, whose module of the same purpose may just be on its way in.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

import torch


class SafeCollector:
    """Takes the place of ``transformers.utils.output_capturing._active_collector``.

    Transformers' own turns into one global for all threads while any of them compiles. This one keeps a context's value
    in the context; only code that is being traced uses another place, which belongs to its thread.
    """

    def __init__(self, replaced: Any = None) -> None:
        self.replaced = replaced
        self._in_context: ContextVar[Any] = ContextVar("output_collector", default=None)
        self._in_trace = threading.local()

    def get(self) -> Any:
        value = getattr(self._in_trace, "value", None)
        if value is not None or torch.compiler.is_dynamo_compiling():
            return value
        return self._in_context.get()

    def set(self, value: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            self._in_trace.value = value
            return None
        return self._in_context.set(value)

    def reset(self, token: Any) -> None:
        if token is None:
            self._in_trace.value = None
        elif getattr(token, "var", None) is self._in_context or self.replaced is None:
            self._in_context.reset(token)
        else:  # the forward began before this object took its place
            self.replaced.reset(token)
