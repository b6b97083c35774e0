"""The rounds of a stream: before each all ranks agree to take part in it, and one that has failed says so there.

Within a round an error is kept for later and the round carried through, as the other ranks expect. Otherwise the
operations that they have posted already would wait on the user's process group for whatever is called next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from weightlift.distributed.team import Team
from weightlift.distributed.wire import Wire
from weightlift.errors import RanksError


class Rounds:
    """One rank's part in the rounds of one stream. To be begun when it is certain that all ranks will."""

    def __init__(self, team: Team, wire: Wire) -> None:
        self._team = team
        self._wire = wire
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether an error waits for the end of the round."""
        return self._error is not None

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep an error of the block for later, if it is the first. The loss of a rank is raised: no round will end."""
        try:
            yield
        except RanksError:
            raise
        except BaseException as error:
            self._error = self._error or error

    def begin(self, messages: Sequence[int] = ()) -> list[int]:
        """How many messages go to each rank in the round that begins, as the source has it; empty after the last.

        Raises the error that was kept, and RanksError where another rank has one; then on every rank.
        """
        if self._error is not None:
            self._team.report(self._error)
        own = [*messages] or [0] * self._team.size
        numbers = torch.tensor([*own, int(self.failed)], dtype=torch.int64).to(self._wire.device)
        with self.keeping():
            self._wire.add_up(numbers)
        *counts, failures = numbers.tolist()
        if any(counts) and not failures:
            return counts
        if self._error is not None:
            error, self._error = self._error, None  # else its traceback would hold this, and all that is staged
            raise error
        if failures:
            self._team.give_up()
        return []
