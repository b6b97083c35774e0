"""Which call of a constructor forced work to be done: what `weightlift.Deferred.forced` is made of."""

from __future__ import annotations

import sys
from pathlib import PurePath
from types import FrameType
from typing import Any

_READABLE = {
    "_local_scalar_dense": "item()", "is_nonzero": "bool()", "equal": "torch.equal", "_to_copy": "to()",
    "nonzero": "nonzero()", "isclose": "torch.isclose", "masked_select": "masked_select()",
}  # fmt: skip


def call_site(why: Any) -> str:
    """``item() at model.py:12 in Model.__init__``: what asked for values, and the nearest line that is neither torch's
    nor weightlift's. A text is given as it is."""
    if isinstance(why, str):
        return why
    op = getattr(why, "_opname", None)
    name = _READABLE.get(op, op) if op else getattr(why, "__qualname__", None) or getattr(why, "__name__", None) or why
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in ("torch", "weightlift"):
        frame = frame.f_back
    if frame is None:
        return str(name)
    code = frame.f_code
    where = getattr(code, "co_qualname", code.co_name)
    return f"{name} at {PurePath(code.co_filename).name}:{frame.f_lineno} in {where}"
