"""The threads of one run: they take work, count bytes, stop at the first error, and end before the run returns."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from weightlift.ambient import outside_modes
from weightlift.errors import LoadCancelled
from weightlift.transfer.progress import Reporter
from weightlift.transfer.share import moving_bytes
from weightlift.transfer.trace import Trace

_POLL_SECONDS = 0.05
_SAMPLE_SECONDS = 0.01

T = TypeVar("T")


class Pool(Generic[T]):
    """Runs ``execute`` on every item; it returns the bytes done. Odd workers prefer ``tasks``, even ones ``pieces``,
    so that neither the disk nor the processor waits for the other kind of work.
    """

    def __init__(
        self,
        pieces: Iterable[T],
        tasks: Iterable[T],
        execute: Callable[[T], int],
        *,
        workers: int,
        reporter: Reporter,
        cancel: threading.Event | None,
        done_bytes: int = 0,
        trace: Trace | None = None,
    ) -> None:
        self._pieces = deque(pieces)
        self._tasks = deque(tasks)
        self._execute = execute
        self._workers = max(1, min(workers, len(self._pieces) + len(self._tasks)))
        self._reporter = reporter
        self._cancel = cancel
        self._trace = trace
        # One counter a worker: no lock, and their sum only grows.
        self._done = [0] * self._workers
        self._before = done_bytes
        # A flag and a lock, not events: Ctrl-C in the middle of an event's Python code leaves it locked for good.
        self._stop = False
        self._finished = threading.Lock()  # free once the last worker has ended
        self._finished.acquire()
        self._running = self._workers
        self._over = [False] * self._workers
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do all work. Raises the first error of an item, of the progress callable, `LoadCancelled` or
        KeyboardInterrupt; in every case no item is being worked on any more."""
        with moving_bytes():
            if self._workers == 1:
                self._work(0, self._report)
            else:
                self._run_threads()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # Its traceback refers to this frame: a cycle would keep the tensors until the next collection.
                del error
        if self._cancelled() and (self._pieces or self._tasks):
            raise LoadCancelled

    def _run_threads(self) -> None:
        threads = [
            threading.Thread(target=self._thread, args=(index,), name=f"weightlift-{index}", daemon=True)
            for index in range(self._workers)
        ]
        begun: list[threading.Thread] = []
        try:
            for thread in threads:
                begun.append(thread)
                try:
                    thread.start()
                except RuntimeError:  # the system gives no more of them; the others do all the work
                    begun.pop()
                    break
            if not begun:
                self._work(0, self._report)
                return
            self._ended(self._workers - len(begun))
            # A wait with a timeout is interruptible at once on every system; it is over when the last worker ends.
            while not self._finished.acquire(timeout=_POLL_SECONDS if self._trace is None else _SAMPLE_SECONDS):
                self._report()
        finally:
            self._stop = True
            self._join_all(begun)

    def _thread(self, index: int) -> None:
        try:
            with outside_modes():
                self._work(index, None)
        except BaseException as error:
            with self._lock:
                if self._error is None:
                    self._error = error
            self._stop = True
        finally:
            self._over[index] = True
            self._ended(1)

    def _join_all(self, threads: list[threading.Thread]) -> None:
        """Wait until all have ended; an interrupt meanwhile is raised afterwards, for they still write into tensors.

        Whatever a signal's handler raises is one. Before Python 3.13 a thread counts as ended, for `join` and
        `is_alive`, once an interrupt came while it was waited for: so each says itself that it is over.
        """
        interrupt: BaseException | None = None
        for index, thread in enumerate(threads):
            while thread.ident is not None:
                try:
                    while not self._over[index]:
                        self._finished.acquire(timeout=_POLL_SECONDS)
                    thread.join()
                    break
                except BaseException as error:
                    interrupt = error
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                del interrupt  # a cycle, as in `run`

    def _ended(self, count: int) -> None:
        with self._lock:
            self._running -= count
            last = count > 0 and self._running == 0
        if last:
            self._finished.release()

    def _work(self, index: int, after: Callable[[], None] | None) -> None:
        tasks_first = index % 2 == 1 or self._workers == 1
        queues = (self._tasks, self._pieces) if tasks_first else (self._pieces, self._tasks)
        for queue in queues:
            while not self._stop and not self._cancelled():
                try:
                    item = queue.popleft()
                except IndexError:
                    break
                self._done[index] += self._execute(item)
                # An exception's traceback would otherwise keep the last item's tensors alive.
                del item
                if after is not None:
                    after()

    def _cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.is_set()

    def _report(self) -> None:
        if self._trace is not None:
            self._trace.sample(every_s=_SAMPLE_SECONDS)
        if self._reporter.active:
            self._reporter.update(self._before + sum(self._done))
