"""Several loads of one call: what each may use, and whose Python code runs when."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from weightlift.errors import LoadCancelled
from weightlift.transfer.pool import Pool
from weightlift.transfer.progress import Reporter
from weightlift.transfer.share import Share, Turn, shares, within

WAIT = 30.0  # seconds; only a test that fails waits as long


def two() -> list[Share]:
    of_each = shares([1, 1], threading.Event())
    for item in of_each:
        item.turn._alone = True  # also where there is no interpreter lock
    return of_each


def started(body: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def pool(work: Callable[[int], int], *, workers: int) -> Pool[int]:
    return Pool([1, 2], [], work, workers=workers, reporter=Reporter(False, 2), cancel=None)


def test_loads_of_one_call_prepare_one_after_the_other() -> None:
    first, second = two()
    entered = threading.Event()

    def other() -> None:
        with within(second):
            entered.set()

    with within(first):
        thread = started(other)
        assert not entered.wait(0.2)
    thread.join(WAIT)
    assert entered.is_set()


@pytest.mark.parametrize("workers", [1, 2])
def test_while_bytes_move_another_load_prepares(workers: int) -> None:
    first, second = two()
    prepared = threading.Event()
    seen = []

    def other() -> None:
        with within(second):
            prepared.set()

    def move(item: int) -> int:
        seen.append(prepared.wait(WAIT))
        return 1

    with within(first):
        thread = started(other)
        pool(move, workers=workers).run()
        assert first.turn._holder == threading.get_ident()  # taken again for what comes afterwards
    thread.join(WAIT)
    assert seen == [True, True]


def test_the_turn_is_given_on_after_a_failure() -> None:
    first, second = two()

    def fail(item: int) -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), within(first):
        pool(fail, workers=1).run()
    with within(second):
        pass


def test_a_thread_without_the_turn_cannot_give_it_away() -> None:
    turn = Turn()
    turn._alone = True

    def other() -> None:
        with turn.given_away():
            pass

    with turn.holding():
        started(other).join(WAIT)
        assert turn._lock.locked()
        assert turn._holder == threading.get_ident()


def test_a_load_that_is_to_stop_does_not_begin() -> None:
    cancel = threading.Event()
    (only,) = shares([1], cancel)
    cancel.set()
    with pytest.raises(LoadCancelled), within(only):
        raise AssertionError("it began")
    assert not only.turn._lock.locked()
