"""Loads that wait for one another by the lock between native ones and those that run alone."""

import logging
import re
import threading

import pytest

from weightlift import locks
from weightlift.integrations.exclusive import NotNative, native_or_alone

PATIENCE_SECONDS = 0.2
LONG_SECONDS = 60


def started(target):
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def queued(lock, count):
    while len(lock._queue) < count:
        threading.Event().wait(0.001)


def test_a_load_whose_constructor_waits_for_a_thread_that_loads_ends_while_another_wants_to_run_alone():
    lock = locks.FairLock(patience_seconds=PATIENCE_SECONDS)
    order = []

    def helper():
        with lock.shared():
            order.append("helper")

    def writer():
        with lock.alone():
            order.append("alone")

    def constructing():
        with lock.shared():
            alone = started(writer)
            queued(lock, 1)
            waited_for = started(helper)
            waited_for.join(LONG_SECONDS)
            order.append("constructed")
        alone.join(LONG_SECONDS)

    started(constructing).join(LONG_SECONDS)
    assert order == ["helper", "constructed", "alone"]


def test_while_loads_end_nobody_overtakes_one_that_wants_to_run_alone():
    lock = locks.FairLock(patience_seconds=LONG_SECONDS)
    order, end = [], threading.Event()

    def reading():
        with lock.shared():
            end.wait(LONG_SECONDS)

    def then(name, holding):
        with holding():
            order.append(name)

    threads = [started(reading)]
    while not lock._readers:
        end.wait(0.001)
    for number, (name, holding) in enumerate([("alone", lock.alone), ("second", lock.shared), ("third", lock.shared)]):
        threads.append(started(lambda name=name, holding=holding: then(name, holding)))
        queued(lock, number + 1)
    end.set()
    for thread in threads:
        thread.join(LONG_SECONDS)
    assert order[0] == "alone" and sorted(order[1:]) == ["second", "third"]


@pytest.mark.parametrize(
    ("runs", "waits", "told"),
    [("alone", "shared", "runs alone; .* wl.install()"), ("shared", "alone", "to run alone; .* in that one's thread")],
)
def test_a_load_that_waits_long_for_another_says_so_once(runs, waits, told, monkeypatch, caplog):
    monkeypatch.setattr(locks, "_WORTH_TELLING_SECONDS", 0.1)
    lock = locks.FairLock(patience_seconds=0.05)
    with caplog.at_level(logging.WARNING, "weightlift"):
        with getattr(lock, runs)():
            waiting = started(lambda: getattr(lock, waits)().__enter__())
            waiting.join(1)
            assert waiting.is_alive()
        waiting.join(LONG_SECONDS)
    (record,) = caplog.records
    assert re.search(told.replace("()", r"\(\)"), record.getMessage())


def test_a_load_that_a_helper_hands_over_is_told_of_once(caplog):
    def native():
        raise NotNative("a test", "it is one")

    with caplog.at_level(logging.INFO, "weightlift"):
        with locks.LOADING.helping(), pytest.raises(locks.HelperThread):
            native_or_alone(dict, native, dict)
        assert not caplog.records
        assert native_or_alone(dict, native, dict) == {}
    assert len(caplog.records) == 1
