"""Tensors from one rank to others through torch.distributed, without ever waiting for a rank that is gone."""

from __future__ import annotations

import pickle
import threading
import time
import zlib
from typing import Any

import torch
import torch.distributed as dist

from weightlift.distributed.team import Team
from weightlift.errors import Problem, RanksError

_CHECK_S = 0.25


class Wire:
    """Sends and receives within a process group. Ranks are numbered as in the group. Used by one thread."""

    def __init__(self, team: Team, group: Any, patience_s: float) -> None:
        self._team = team
        self._group = dist.group.WORLD if group is None else group
        self._patience_s = patience_s
        self.device = _device_of(self._group)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a contiguous tensor that lies on ``device``."""
        self._finish(dist.isend(tensor, group=self._group, group_dst=to))

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """Fill a contiguous tensor that lies on ``device``."""
        self._finish(dist.irecv(tensor, group=self._group, group_src=source))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Send to all, or fill with what ``source`` sends to all."""
        self._finish(dist.broadcast(tensor, group=self._group, group_src=source, async_op=True))

    def hand_out(self, value: Any, source: int) -> Any:
        """An object of one rank, on every rank. As torch's own object collectives this trusts the ranks."""
        length = torch.zeros(1, dtype=torch.int64, device=self.device)
        data = torch.empty(0, dtype=torch.uint8)
        if self._team.rank == source:
            data = torch.frombuffer(bytearray(zlib.compress(pickle.dumps(value), 1)), dtype=torch.uint8)
            data = data.to(self.device)
            length += data.numel()
        self.broadcast(length, source)
        if self._team.rank != source:
            data = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
        self.broadcast(data, source)
        return pickle.loads(zlib.decompress(bytes(data.cpu().numpy())))

    def _finish(self, work: Any) -> None:
        """Wait for one operation, and meanwhile for bad news of other ranks."""
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
        # until the connection ends.
        threading.Thread(target=wait, name="weightlift-wire", daemon=True).start()
        while not done.wait(_CHECK_S):
            self._team.check()
        if errors:
            self._explain(errors[0])

    def _explain(self, error: BaseException) -> None:
        """A broken connection: the rank behind it says why, or is found to be lost."""
        until = time.monotonic() + 2 * self._patience_s
        while time.monotonic() < until:
            self._team.check()
            time.sleep(_CHECK_S)
        raise RanksError("the connection to another rank broke", [Problem(str(error))]) from error


def _device_of(group: Any) -> torch.device:
    """The CPU where the group's backends serve it, else the accelerator that they serve."""
    kinds = [device.type for device in group._device_types]
    if "cpu" in kinds or not kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
