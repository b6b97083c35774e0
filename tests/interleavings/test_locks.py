"""What threads share while they load, in every order of their turns: locks, the budget, files, blocks, reservations."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from tests.interleavings.explorer import explore
from tests.interleavings.stand_ins import stand_in

from weightlift import locks
from weightlift.deferred import reserve
from weightlift.transfer import budget, memory, pool, share, sources
from weightlift.transfer.progress import Reporter

HERE = sys.modules[__name__]
MODULES = (locks, budget, sources, memory, reserve, pool, share)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    stand_in(monkeypatch, *MODULES)


class _Room:
    """Who is inside; a writer has to be alone there."""

    def __init__(self, lock):
        self.lock = lock
        self.inside: list[str] = []
        self.visits = 0

    def _visit(self, who):
        self.inside.append(who)
        assert who == "reader" or self.inside == ["writer"], self.inside
        assert who == "writer" or "writer" not in self.inside, self.inside
        self.visits += 1
        self.inside.remove(who)

    def read(self):
        with self.lock.shared():
            self._visit("reader")
            with self.lock.shared():
                self._visit("reader")

    def write(self):
        with self.lock.alone():
            self._visit("writer")
            with self.lock.alone(), self.lock.shared():
                assert self.lock.writing

    def step_out(self):
        with self.lock.shared():
            self._visit("reader")
            with self.lock.alone():
                self._visit("writer")
            self._visit("reader")

    def left(self):
        assert not self.inside
        assert not (self.lock._queue or self.lock._readers or self.lock._helpers or self.lock._writer)


@pytest.mark.parametrize(
    "visitors", [("read", "write"), ("step_out", "step_out"), ("read", "step_out"), ("write", "write"),
                 ("read", "write", "read"), ("step_out", "write", "read")],
    ids="-".join,
)  # fmt: skip
def test_the_lock_of_native_and_other_loads(visitors):
    def scene():
        room = _Room(locks.FairLock())
        return [getattr(room, visitor) for visitor in visitors], room.left

    assert explore(scene, inside=[locks, HERE], preemptions=1).complete


def test_a_helper_never_waits_for_a_writer_who_waits_for_whom_it_helps():
    def scene():
        lock = locks.FairLock()
        helped = locks.threading.Event()
        told = []

        def reader():
            def help_it():
                with lock.helping(), lock.shared():
                    try:
                        with lock.alone():
                            told.append("alone")
                    except locks.HelperThread:
                        told.append("refused")
                helped.set()

            with lock.shared():
                locks.threading.Thread(help_it).start()
                helped.wait()

        def writer():
            with lock.alone():
                assert not lock._readers

        def check():
            assert told == ["refused"]

        return [reader, writer], check

    assert explore(scene, inside=[locks], preemptions=1).complete


def test_a_reader_that_another_one_waits_for_does_not_wait_behind_a_writer():
    def scene():
        lock = locks.FairLock()
        read = locks.threading.Event()
        order = []

        def waiting():
            def awaited():
                with lock.shared():
                    order.append("awaited")
                read.set()

            with lock.shared():
                locks.threading.Thread(awaited).start()
                read.wait()
                order.append("waiting")

        def writer():
            with lock.alone():
                assert not lock._readers
                order.append("writer")

        def check():
            assert len(order) == 3 and order.index("awaited") < order.index("waiting")

        return [waiting, writer], check

    assert explore(scene, inside=[locks], preemptions=1).complete


@pytest.mark.parametrize("sizes", [(6, 6), (6, 20, 6), (10, 10, 1)])
def test_the_budget_is_kept(sizes):
    def scene():
        kept = budget.Budget(10)
        held: list[int] = []

        def take(nbytes):
            with kept.holding(nbytes):
                held.append(nbytes)
                assert sum(held) <= 10 or len(held) == 1, held
                held.remove(nbytes)

        def check():
            assert kept._held_bytes == 0

        return [lambda nbytes=nbytes: take(nbytes) for nbytes in sizes], check

    assert explore(scene, inside=[budget, HERE], preemptions=4 - len(sizes)).complete


@pytest.mark.parametrize("failing", [None, 1])
def test_one_load_prepares_at_a_time_and_all_get_their_turn(failing):
    def scene():
        turn = share.Turn()
        preparing: list[int] = []
        ended: list[int] = []

        def prepare(number):
            preparing.append(number)
            assert preparing == [number]
            preparing.remove(number)

        def load(number):
            try:
                with turn.holding():
                    prepare(number)
                    with turn.given_away():
                        if number == failing:
                            raise ValueError
                    prepare(number)
            except ValueError:
                pass
            with turn.given_away():  # not the holder: nothing happens
                ended.append(number)

        def check():
            assert sorted(ended) == [0, 1, 2]
            assert turn._holder is None and not turn._lock.locked()

        return [lambda number=number: load(number) for number in range(3)], check

    assert explore(scene, inside=[share, HERE], preemptions=1).complete


class _File:
    def __init__(self):
        self.open = True

    def read(self):
        assert self.open

    def changed(self):
        return None

    def close(self):
        assert self.open
        self.open = False


class _Source:
    def __init__(self):
        self.opened: list[_File] = []

    def open(self, file):
        self.opened.append(_File())
        return self.opened[-1]


def test_a_file_is_open_while_anyone_reads_and_opened_once():
    path = Path("a")

    def scene():
        source = _Source()
        files = sources.OpenFiles(source, {path: None}, [path] * 4)

        def reader():
            for _ in range(2):
                files.get(path).read()
                files.done(path)

        def check():
            assert not any(file.open for file in source.opened)
            assert len(source.opened) == 1

        return [reader, reader], check

    assert explore(scene, inside=[sources, HERE], preemptions=2).complete


def test_a_block_is_one_threads_at_a_time():
    def scene():
        blocks = memory.StagingPool(16, 2)
        mine: list[object] = []

        def use():
            for _ in range(2):
                block = blocks.take()
                assert not any(block is other for other in mine)
                mine.append(block)
                mine.remove(block)
                blocks.give(block)

        def check():
            assert len(blocks._free) <= 2

        return [use, use], check

    assert explore(scene, inside=[memory, HERE], preemptions=2).complete


def test_reservations_do_not_overlap():
    def scene():
        reservations = reserve.Reservations()
        given: list[tuple[int, int]] = []

        def want():
            for nbytes in (100, 3):
                _, block, offset = reservations.reserve(nbytes)
                given.append((block.address + offset, nbytes))

        def check():
            ranges = sorted(given)
            assert len(ranges) == 4
            assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(ranges))

        return [want, want], check

    assert explore(scene, inside=[reserve], preemptions=2).complete


@pytest.mark.parametrize("failing", [None, 1])
@pytest.mark.parametrize("cancelled", [False, True])
def test_the_pool_does_each_item_once_and_ends(failing, cancelled):
    def scene():
        done: list[int] = []
        ended: list[object] = []
        cancel = pool.threading.Event()

        def execute(item):
            if item == failing:
                raise ValueError(item)
            done.append(item)
            return 1

        def caller():
            made = pool.Pool([0, 1], [2, 3], execute, workers=2, reporter=Reporter(None, 4), cancel=cancel)
            try:
                made.run()
                ended.append(sum(made._done))
            except (ValueError, pool.LoadCancelled) as error:
                ended.append(type(error))
            assert made._running == 0

        def check():
            assert len(done) == len(set(done))
            (end,) = ended
            assert end == 4 or (failing is not None and end is ValueError) or (cancelled and end is pool.LoadCancelled)
            assert end != 4 or sorted(done) == [0, 1, 2, 3]

        return [caller, cancel.set] if cancelled else [caller], check

    assert explore(scene, inside=[pool], preemptions=1, opcodes=True).complete
