"""Runs threads one at a time and tries, one after the other, the orders in which they can take turns.

A thread may lose its turn before every line (or every bytecode) of the modules that are looked at, and wherever it has
to wait for a lock. What it does elsewhere counts as one step. Orders are tried depth first: first those without a
preemption, then with the last possible one moved, and so on, up to a bound on the number of preemptions (Musuvathi
and Qadeer, "Iterative context bounding for systematic testing of multithreaded programs", 2007). An order is a list of
choices, 0 where nothing else is said; the same list gives the same run again.

Locks have to be stand-ins (`threads_of`), because a thread that waits in a real one keeps its turn for ever.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType, ModuleType
from typing import Any

_current: Run | None = None
_STALL_SECONDS = 60


class Stopped(BaseException):
    """Ends a thread of a run that has failed."""


class Stuck(AssertionError):
    """No thread can go on."""


@dataclass
class Worker:
    """One thread of a run."""

    number: int
    body: Callable[[], None]
    may_go: Callable[[], bool] | None = None  # what it waits for; None: nothing
    timed: bool = False  # it would also wake up by itself
    ended: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None


@dataclass(frozen=True)
class Explored:
    """What was tried."""

    orders: int
    longest: int  # the most places of one run at which a thread could lose its turn
    complete: bool  # every order within the bound


class Run:
    """One run, in the order that ``choices`` give; where they end, a thread keeps its turn as long as it can."""

    def __init__(self, choices: Sequence[int], *, files: set[str], opcodes: bool, preemptions: int, every: int) -> None:
        self._choices = choices
        self._files = files
        self._event = "opcode" if opcodes else "line"
        self._left = preemptions
        self._every = every
        self._workers: list[Worker] = []
        self._me: Worker | None = None
        self._over = threading.Event()
        self.failed: BaseException | None = None
        self.trail: list[tuple[int, int]] = []  # of each choice, how many there were and which was taken
        self.places = 0

    # -- the threads of the run call these ----------------------------------------------------------------------------

    def add(self, body: Callable[[], None]) -> Worker:
        """One more thread. It begins when it is given a turn."""
        worker = Worker(len(self._workers), body)
        worker.thread = threading.Thread(target=self._live, args=(worker,), daemon=True)
        self._workers.append(worker)
        worker.thread.start()
        return worker

    def place(self) -> None:
        """Here the thread may lose its turn."""
        if self.failed is not None:
            raise Stopped
        self.places += 1
        if self._left and self.places % self._every == 0:
            self._pass_on()

    def wait(self, may_go: Callable[[], bool], *, timed: bool = False) -> bool:
        """Wait until ``may_go()``. False if ``timed`` and nothing else could go on before."""
        assert self._me is not None
        me = self._me
        if self.failed is not None:
            raise Stopped
        if may_go():
            return True
        me.may_go, me.timed = may_go, timed
        self._pass_on()
        me.may_go = None
        return may_go()

    # -- who is next --------------------------------------------------------------------------------------------------

    def _pass_on(self) -> None:
        me = self._me
        following = self._next()
        if following is None:
            self._end(Stuck("no thread can go on: " + ", ".join(map(_where, self._workers))))
        elif following is not me:
            self._me = following
            following.turn.release()
        else:
            return
        if me is not None and not me.ended:
            me.turn.acquire()
            if self.failed is not None:
                raise Stopped

    def _next(self) -> Worker | None:
        able = [worker for worker in self._workers if not worker.ended and (worker.may_go is None or worker.may_go())]
        if not able:
            able = [worker for worker in self._workers if not worker.ended and worker.timed and worker.may_go]
        if not able:
            return None
        me = self._me
        preempting = me in able
        if preempting:
            assert me is not None
            able.remove(me)
            able.insert(0, me)
            if not self._left:
                return me
        if len(able) == 1:
            return able[0]
        at = len(self.trail)
        choice = self._choices[at] if at < len(self._choices) else 0
        self.trail.append((len(able), choice))
        if preempting and choice:
            self._left -= 1
        return able[choice]

    # -- from outside -------------------------------------------------------------------------------------------------

    def go(self, bodies: Sequence[Callable[[], None]]) -> None:
        """Run ``bodies`` to their ends. Raises what one of them raised, or `Stuck`."""
        for body in bodies:
            self.add(body)
        self._pass_on()
        if not self._over.wait(_STALL_SECONDS):
            where = ", ".join(map(_where, self._workers))
            raise Stuck(f"a thread goes round for ever, or waits in something that is no stand-in: {where}")
        for worker in self._workers:
            assert worker.thread is not None
            worker.thread.join()
        if self.failed is not None:
            raise self.failed

    def _live(self, worker: Worker) -> None:
        worker.turn.acquire()
        try:
            if self.failed is None:
                sys.settrace(self._call)
                worker.body()
        except Stopped:
            pass
        except BaseException as error:
            sys.settrace(None)
            self._end(error)
        finally:
            sys.settrace(None)
            worker.ended = True
            if all(each.ended for each in self._workers):
                self._over.set()
            elif self.failed is None:
                self._pass_on()

    def _end(self, error: BaseException) -> None:
        if self.failed is None:
            self.failed = error
        for worker in self._workers:
            worker.turn.release()

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = self._event == "opcode"
        return self._step

    def _step(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == self._event:
            self.place()
        return self._step


def _where(worker: Worker) -> str:
    if worker.ended:
        return f"{worker.number} has ended"
    assert worker.thread is not None
    frame = sys._current_frames().get(worker.thread.ident or 0)
    while frame is not None and frame.f_code.co_filename in (__file__, threading.__file__):
        frame = frame.f_back
    place = "its beginning" if frame is None else f"{frame.f_code.co_name}:{frame.f_lineno}"
    return f"{worker.number} is at {place}"


def current() -> Run:
    """The run that is under way."""
    assert _current is not None
    return _current


def explore(
    scene: Callable[[], tuple[Sequence[Callable[[], None]], Callable[[], None]]],
    *,
    inside: Sequence[ModuleType],
    preemptions: int = 2,
    opcodes: bool = False,
    every: int = 1,
    limit: int = 100_000,
) -> Explored:
    """Try the orders of the threads of ``scene``: called before each run, it gives their bodies and a check for after.

    Threads lose their turn only ``inside`` these modules, at every ``every``-th place, ``preemptions`` times at most in
    one run. An error of a body or of the check is raised with the choices that led to it.
    """
    files = {module.__file__ for module in inside if module.__file__ is not None}
    choices: list[int] | None = []
    tried = longest = 0
    while choices is not None and tried < limit:
        run = Run(choices, files=files, opcodes=opcodes, preemptions=preemptions, every=every)
        with _under_way(run):
            bodies, check = scene()
            try:
                run.go(bodies)
                check()
            except Exception as error:
                made = {at: choice for at, (_, choice) in enumerate(run.trail) if choice}
                raise AssertionError(f"order {tried + 1}, choices {made}: {error!r}") from error
        tried += 1
        longest = max(longest, run.places)
        choices = _following(run.trail)
    print(f"{tried:,} orders, at most {longest:,} places")  # pytest shows it with -rP
    return Explored(tried, longest, choices is None)


def _following(trail: Sequence[tuple[int, int]]) -> list[int] | None:
    for at in range(len(trail) - 1, -1, -1):
        count, choice = trail[at]
        if choice + 1 < count:
            return [chosen for _, chosen in trail[:at]] + [choice + 1]
    return None


@contextlib.contextmanager
def _under_way(run: Run) -> Iterator[None]:
    global _current
    _current = run
    try:
        yield
    finally:
        _current = None
