"""Loads of other libraries' models: natively, beside all others, or left to the library's own code, alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from weightlift.locks import LOADING

_log = logging.getLogger("weightlift")

T = TypeVar("T")


class NotNative(Exception):
    """A load that is left to the library it is for."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what = what
        self.why = why


def native_or_alone(cls: Any, native: Callable[[], T], original: Callable[[], T]) -> T:
    """``native()`` beside other loads; where that raises `NotNative`, ``original()`` while no other load runs.

    In a thread that runs alone already it is ``original()`` at once: that load came from the library's own code. Raises
    what they raise, and `HelperThread` in a helper that would have to run alone.
    """
    from weightlift.ambient import Undisturbed  # here: this is imported before torch is

    if LOADING.writing:
        return original()
    try:
        with Undisturbed(), LOADING.shared():
            return native()
    except NotNative as found:
        reason = found.what, found.why  # and not the error: it holds all that was tried
    with Undisturbed(), LOADING.alone():  # which a helper leaves to the thread that it helps, the telling too
        _log.info("%s: loaded by its own library, alone in the process: %s (%s)", cls.__name__, *reason)
        return original()
