"""Tensors between ranks through torch.distributed, so that afterwards nothing is pending on the user's process group.

An operation that not every rank takes part in stays there, and is matched with whatever the caller does next: the
bytes of a load that failed would end up in his tensors. So operations are posted once it is certain that all ranks will
post theirs, and are waited for to their end whatever else goes wrong, but for the loss of a rank.
"""

from __future__ import annotations

import pickle
import threading
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from weightlift.distributed.team import Team
from weightlift.errors import Problem, RanksError

_CHECK_S = 0.25


class Wire:
    """Sends and receives within a process group. Ranks are numbered as in the group. Used by one thread.

    Raises RanksError when a rank is lost, and what interrupted the wait (Ctrl-C) once an operation has ended.
    """

    def __init__(self, team: Team, group: Any) -> None:
        self._team = team
        self._group = dist.group.WORLD if group is None else group
        self.device = _device_of(self._group)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a contiguous tensor that lies on ``device``."""
        self._finish(lambda: dist.isend(tensor, group=self._group, group_dst=to))

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """Fill a contiguous tensor that lies on ``device``."""
        self._finish(lambda: dist.irecv(tensor, group=self._group, group_src=source))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Send to all, or fill with what ``source`` sends to all."""
        self._finish(lambda: dist.broadcast(tensor, group=self._group, group_src=source, async_op=True))

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor that lies on ``device`` by the sum of those of all ranks."""
        self._finish(lambda: dist.all_reduce(tensor, group=self._group, async_op=True))

    def hand_out(self, value: Any, source: int) -> Any:
        """An object of one rank, on every rank. As torch's own object collectives this trusts the ranks.

        The size goes ahead through the store: a source that has nothing to hand out has failed, and says that there.
        """
        data = torch.empty(0, dtype=torch.uint8)
        if self._team.rank == source:
            data = torch.frombuffer(bytearray(zlib.compress(pickle.dumps(value), 1)), dtype=torch.uint8)
            data = data.to(self.device)
        length = int(self._team.hand_out(source, str(data.numel()).encode()))
        if self._team.rank != source:
            data = torch.empty(length, dtype=torch.uint8, device=self.device)
        self._team.meet(source)
        self.broadcast(data, source)
        return pickle.loads(zlib.decompress(bytes(data.cpu().numpy())))

    def _finish(self, post: Callable[[], Any]) -> None:
        """Post one operation and see it through."""
        try:
            work = post()
        except Exception as error:
            self._explain(error)
        if work is None:
            return
        done = threading.Event()
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                work.wait()
                if self.device.type != "cpu":
                    torch.get_device_module(self.device).synchronize(self.device)
            except BaseException as error:
                errors.append(error)
            done.set()

        # A thread of its own: the wait of a backend can't be taken back. Should a rank be lost, it is left behind
        # until the connection ends, and the group is of no use to anybody.
        threading.Thread(target=wait, name="weightlift-wire", daemon=True).start()
        interruption = self._until(done)
        if errors:
            self._explain(errors[0])
        if interruption is not None:
            raise interruption

    def _until(self, done: threading.Event) -> BaseException | None:
        """Wait, and meanwhile for the loss of a rank. What interrupts the wait is returned, for afterwards."""
        interruption = None
        while not done.is_set():
            try:
                if not done.wait(_CHECK_S):
                    self._team.check_lives()
            except RanksError:
                raise
            except BaseException as error:
                interruption = error
        return interruption

    def _explain(self, error: BaseException) -> NoReturn:
        """A broken connection: the rank behind it says why, or is found to be lost."""
        self._team.look_for_losses()
        raise RanksError("the connection to another rank broke", [Problem(str(error))]) from error


def _device_of(group: Any) -> torch.device:
    """The CPU where the group's backends serve it, else the accelerator that they serve."""
    kinds = [device.type for device in group._device_types]
    if "cpu" in kinds or not kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
