"""Memory of another construction that is under way: a cache of the process hands on what a constructor made.

What a tensor waits for is in the tape of the construction that it was born in, which is for one thread. A construction
that meets such a tensor therefore asks. One of its own thread (a load within a constructor) gives the values at once;
one of another thread at its next torch call, or when it ends. Who waits answers what it is asked meanwhile, so that two
that want each other's tables both get them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Protocol

from weightlift.deferred.tape import Record

PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.005


class Wish:
    """What one construction asks of another: that a record's values be there."""

    __slots__ = ("error", "over", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.over = threading.Event()
        self.error: BaseException | None = None


class Construction(Protocol):
    """What others see of one."""

    records: dict[int, Record]
    wishes: deque[Wish]
    under_way: int

    def hand_out(self, record: Record, why: str) -> None:
        """Give a record its values, and put no later write to it off."""


_under_way: dict[int, tuple[Construction, int]] = {}  # by its id: each, and its thread
under_way: Mapping[int, object] = _under_way


@contextlib.contextmanager
def known(construction: Construction) -> Iterator[None]:
    """While it is under way."""
    _under_way[id(construction)] = construction, threading.get_ident()
    construction.under_way = 1
    try:
        yield
    finally:
        construction.under_way = 0
        _under_way.pop(id(construction), None)
        answer(construction)


def answer(construction: Construction) -> None:
    """Do what others asked. For the construction's own thread."""
    while construction.wishes:
        wish = construction.wishes.popleft()
        try:
            construction.hand_out(wish.record, "a constructor in another thread")
        except BaseException as error:
            wish.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            wish.over.set()


def meet(construction: Construction, address: int) -> None:
    """See to it that a storage which was not born in ``construction`` has its values.

    Raises RuntimeError where the constructor that made it does not go on.
    """
    thread = threading.get_ident()
    for other, its_thread in _under_way.copy().values():
        record = None if other is construction else other.records.get(address)
        if record is None:
            continue
        if its_thread == thread:
            other.hand_out(record, "a load within the constructor")
        elif record.pending or (record.block.sealed and not record.opened):
            _ask(construction, other, record)


def _ask(construction: Construction, other: Construction, record: Record) -> None:
    wish = Wish(record)
    other.wishes.append(wish)
    if id(other) not in _under_way:
        return  # it has ended meanwhile: what others hold has its values
    until = time.monotonic() + PATIENCE_SECONDS
    while not wish.over.wait(_LOOK_SECONDS):
        answer(construction)
        if time.monotonic() > until:
            raise RuntimeError(
                f"a tensor that the constructor of another thread made has no values, and that constructor has called"
                f" nothing of torch for {PATIENCE_SECONDS:.0f} s: it may wait for this thread. Let it read the tensor"
                " first, or build with defer=False"
            )
    if wish.error is not None:
        raise RuntimeError("a tensor that the constructor of another thread made has no values") from wish.error


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_under_way.clear)  # their threads are not there
