"""The ranks that load together: they compare notes before reading, and no rank is left waiting for one that failed.

Notes go through the key-value store that ``torch.distributed`` was initialised with, so that this works with every
backend, holds no collective open and needs no process group of its own. While a rank works, a thread of it shows every
second or so that it is alive. A rank that raises says so; one that shows no life for ``patience_s`` counts as lost.
Either makes every rank raise a `RanksError` that names it.

A load has stages, each with notes of its own. The last rank to leave a stage deletes them: nobody reads any more.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from weightlift.errors import Problem, RanksError, WeightliftError

_JOINING = 10  # times the patience: ranks may come late to a load, but are quick to answer within one
_FIRST_POLL_S, _LAST_POLL_S = 0.005, 0.25
_SHOWN_CHARACTERS = 2000

_begun_lock = threading.Lock()
# How many loads this process has begun in each group: the same on every member. Names of groups are given anew once
# torch.distributed is initialised again, and then members may have another past.
_begun: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class Team:
    """This rank's link to the others, for one load. Used by one thread; the heartbeat has its own.

    All but ``names``, ``rank`` and ``size`` is for use within `at_work`.
    """

    def __init__(self, store: Any, rank: int, names: Sequence[int], patience_s: float) -> None:
        self.rank = rank
        self.names = tuple(names)
        self._of_load = store
        self._patience_s = patience_s
        self._stages = 0
        self._stage = ""
        self._store = store
        self._reported = False
        self._exchanges = 0

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.names)

    @classmethod
    def of(cls, group: Any, patience_s: float) -> Team | None:
        """The team of a process group (None: all ranks); None where this process is alone.

        Raises ValueError where this process is not a member of the group, TypeError for what is no group.
        """
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        if not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if group is None else group
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"rank {dist.get_rank()} is no member of process_group, whose members load together; "
                "call it on them alone, or without process_group"
            )
        if not isinstance(group, dist.ProcessGroup):
            what = "process_group must be what mesh.get_group() or torch.distributed.new_group() returns"
            raise TypeError(f"{what}, found {type(group).__name__}")
        if dist.get_world_size(group) < 2 or dist.get_backend(group) == "fake":
            return None
        with _begun_lock:
            number = _begun[group] = _begun.get(group, 0) + 1
        prefix = f"weightlift/{group.group_name}/{number}"
        store = distributed_c10d.PrefixStore(prefix, distributed_c10d._get_default_store())
        return cls(store, dist.get_rank(group), dist.get_process_group_ranks(group), patience_s)

    # -- at work ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def at_work(self, stage: str) -> Iterator[None]:
        """Show life while the block runs, and tell the others when it raises. All ranks enter equally often."""
        self._enter(stage)
        stop = threading.Event()
        beating = threading.Thread(target=self._beat, args=(stop,), name="weightlift-ranks", daemon=True)
        self._say(f"beat/{self.rank}", b"1")
        beating.start()
        try:
            yield
        except BaseException as error:
            self.report(error)
            raise
        finally:
            stop.set()
            beating.join()
            self._leave()

    def _enter(self, stage: str) -> None:
        from torch.distributed.distributed_c10d import PrefixStore

        self._stages += 1
        self._stage = stage
        self._store = PrefixStore(str(self._stages), self._of_load)
        self._reported = False
        self._exchanges = 0

    def _leave(self) -> None:
        with contextlib.suppress(Exception):  # the store is gone, and its keys with it
            if self._store.add("left", 1) == self.size:
                for key in self._store.list_keys():
                    self._store.delete_key(key)

    def report(self, error: BaseException) -> None:
        """Tell the other ranks why this one gives up. What came from another rank is not told again."""
        if isinstance(error, RanksError) or self._reported:
            return
        self._reported = True
        with contextlib.suppress(Exception):  # the store is gone: nobody is left to tell
            self._add_failure(self.rank, f"{type(error).__name__}: {error}")

    def exchange(self, note: str, judge: Callable[[list[str]], str]) -> str:
        """Every rank's note goes to the first rank of the team, which judges them; its verdict goes to every rank.

        Raises RanksError when a rank failed or is lost.
        """
        place = self._next_place()
        if self.rank != 0:
            self._say(f"{place}/note/{self.rank}", note.encode())
            return self._hear(f"{place}/verdict", [0]).decode()
        # Its heartbeat watches the others.
        others = [self._hear(f"{place}/note/{other}", []).decode() for other in range(1, self.size)]
        verdict = judge([note, *others])
        self._say(f"{place}/verdict", verdict.encode())
        return verdict

    def hand_out(self, source: int, value: bytes | None) -> bytes:
        """The ``value`` of one rank, on every rank."""
        place = f"{self._next_place()}/value"
        if self.rank != source:
            return self._hear(place, [source])
        assert value is not None
        self._say(place, value)
        return value

    def collect(self, at: int, note: bytes) -> list[bytes]:
        """Every rank's note, on the one rank ``at``; an empty list on the others."""
        place = f"{self._next_place()}/note"
        if self.rank != at:
            self._say(f"{place}/{self.rank}", note)
            return []
        others = range(self.size)
        return [note if other == at else self._hear(f"{place}/{other}", [other]) for other in others]

    def meet(self, at: int) -> None:
        """Wait until every rank is here; then all of them go on. ``at`` is the rank that finds out."""
        self.collect(at, b"here")
        self.hand_out(at, b"go")

    def all_done(self) -> None:
        """Wait until every rank has come to this point. Raises RanksError when one will not."""
        self.exchange("done", lambda _: "done")

    def check(self) -> None:
        """Raise RanksError if a rank has failed."""
        self._refuse(self._heard())

    def check_lives(self) -> None:
        """Raise RanksError if a rank is lost. One that failed still does its part of what has been agreed."""
        failures = self._heard()
        if any(lost for _, lost in failures):
            self._refuse(failures)

    def give_up(self) -> NoReturn:
        """Raise RanksError once the rank that is known to have failed has said why."""
        until = time.monotonic() + self._patience_s
        while time.monotonic() < until:
            self.check()
            time.sleep(_FIRST_POLL_S)
        raise RanksError("another rank failed and did not say why, so this one gives up")

    def look_for_losses(self) -> None:
        """Raise RanksError once a rank has failed or is lost; return when in twice the patience none has."""
        lives = _Lives(self._store, [rank for rank in range(self.size) if rank != self.rank], self._patience_s)
        until = time.monotonic() + 2 * self._patience_s
        while time.monotonic() < until:
            try:
                for other, came in lives.lost():
                    self._add_lost(other, came=came)
            except Exception as error:
                raise self._store_lost(error) from error
            self.check()
            time.sleep(_LAST_POLL_S)

    # -- inner workings -----------------------------------------------------------------------------------------------

    def _next_place(self) -> int:
        """Exchanges are numbered: every rank takes part in all of them, in the same order."""
        self._exchanges += 1
        return self._exchanges

    def _hear(self, key: str, watched: Sequence[int]) -> bytes:
        """Wait for a key. ``watched`` are the ranks without which it can't come."""
        lives = _Lives(self._store, watched, self._patience_s)
        pause = _FIRST_POLL_S
        while True:
            try:
                # In this order: a rank that wrote the key and failed afterwards has still been heard.
                failures = self._failures()
                if self._store.check([key]):
                    return bytes(self._store.get(key))
                lost = lives.lost()
            except Exception as error:
                raise self._store_lost(error) from error
            self._refuse(failures)
            for other, came in lost:
                self._add_lost(other, came=came)
            time.sleep(pause)
            pause = min(pause * 1.5, _LAST_POLL_S)

    def _beat(self, stop: threading.Event) -> None:
        """Show life; the first rank of the team also looks after the others while it is busy itself."""
        lives = _Lives(self._store, range(1, self.size) if self.rank == 0 else [], self._patience_s)
        period = min(1.0, self._patience_s / 5)
        count = 1
        while not stop.wait(period):
            count += 1
            try:
                self._store.set(f"beat/{self.rank}", str(count))
                for other, came in lives.lost():
                    self._add_lost(other, came=came)
            except Exception:  # the store is gone: the main thread will find out
                return

    def _failures(self) -> list[tuple[str, bool]]:
        """Each failure that was reported, and whether it is the loss of a rank."""
        keys = [f"failure/{number}" for number in range(1, self._store.add("failures", 0) + 1)]
        # A report is counted before it is written; one that is on its way is seen the next time.
        texts = dict.fromkeys(bytes(self._store.get(key)) for key in keys if self._store.check([key]))
        return [(found["what"], found["lost"]) for found in map(json.loads, texts)]

    def _heard(self) -> list[tuple[str, bool]]:
        try:
            return self._failures()
        except Exception as error:
            raise self._store_lost(error) from error

    def _refuse(self, failures: Sequence[tuple[str, bool]]) -> None:
        if failures:
            problems = [Problem(what) for what, _ in failures]
            raise RanksError("other ranks failed, so this one gives up", problems)

    def _add_lost(self, rank: int, *, came: bool) -> None:
        text = f"no sign of life for {self._patience_s:g} s while {self._stage}; it was killed"
        if not came:
            waited = f"{_JOINING * self._patience_s:g} s"
            text = f"it did not come within {waited} while {self._stage}; it was killed, or makes no such load"
        self._add_failure(rank, text, lost=True)

    def _add_failure(self, rank: int, text: str, *, lost: bool = False) -> None:
        found = {"what": f"rank {self.names[rank]}: {text[:_SHOWN_CHARACTERS]}", "lost": lost}
        number = self._store.add("failures", 1)
        self._store.set(f"failure/{number}", json.dumps(found))

    def _say(self, key: str, value: bytes) -> None:
        try:
            self._store.set(key, value)
        except Exception as error:
            raise self._store_lost(error) from error

    def _store_lost(self, error: Exception) -> WeightliftError:
        problem = Problem(
            f"the store of torch.distributed does not answer: {error}",
            hint="the process that holds it, rank 0 unless torchrun does, is gone",
        )
        return RanksError("the ranks lost one another", [problem])


class _Lives:
    """Watches other ranks' signs of life; each is lost once, `patience_s` after the last one (by this rank's clock)."""

    def __init__(self, store: Any, ranks: Sequence[int], patience_s: float) -> None:
        self._store = store
        self._patience_s = patience_s
        now = time.monotonic()
        self._seen: dict[int, tuple[bytes, float]] = dict.fromkeys(ranks, (b"", now))
        self._next = now

    def lost(self) -> list[tuple[int, bool]]:
        """Ranks that have just become lost, and whether they ever came to the stage: they have ten times as long."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + min(1.0, self._patience_s / 5)
        found = []
        for rank, (beat, since) in list(self._seen.items()):
            key = f"beat/{rank}"
            current = bytes(self._store.get(key)) if self._store.check([key]) else b""
            if current != beat:
                self._seen[rank] = (current, now)
            elif now - since > self._patience_s * (1 if beat else _JOINING):
                del self._seen[rank]
                found.append((rank, bool(beat)))
        return found
