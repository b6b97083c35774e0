"""Copies to an accelerator: pinned staging, a stream of its own, events before staging is used again.

Nothing here names one vendor: ``torch.accelerator`` finds the device's module, and tests put a fake `Backend` in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

import torch

from weightlift.errors import PlanError, Problem
from weightlift.plan.records import Decisions
from weightlift.transfer.memory import Mark


class Backend(Protocol):
    """What the engine needs of one device. `pinned`, `stream` and `record` are called from several threads."""

    def reserve(self, nbytes: int) -> None:
        """Called first, with what will be asked of `empty` in all. Whether there is as much shows there, not here."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the device."""
        ...

    def begin(self) -> None:
        """Called by the thread that loads, once all destinations are there: copies come after what the device was asked
        to do before."""
        ...

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory, as uint8, that the device can copy from while the host goes on."""
        ...

    def stream(self) -> AbstractContextManager[Any]:
        """Makes the transfer's stream current for the calling thread."""
        ...

    def record(self) -> Mark:
        """Mark the transfer's stream here."""
        ...

    def synchronize(self) -> None:
        """Wait for all copies of the transfer."""
        ...


class TorchBackend:
    """Any device whose torch module has streams and events (cuda, xpu, …). One object a run and device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._stream: Any = self._module.Stream(device=device)

    def reserve(self, nbytes: int) -> None:
        """See `Backend.reserve`. The allocator keeps what is let go of, so that it asks the driver once instead of
        once a tensor, as Transformers' own loading has it do."""
        if not (hasattr(self._module, "memory_reserved") and hasattr(self._module, "memory_allocated")):
            return
        kept = self._module.memory_reserved(self.device) - self._module.memory_allocated(self.device)
        if nbytes > kept:
            with suppress(RuntimeError):  # not in one piece
                torch.empty(nbytes - kept, dtype=torch.uint8, device=self.device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Backend.empty`."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def begin(self) -> None:
        """See `Backend.begin`. New tensors may lie in memory that other threads have just let go of, while their work
        on the caller's stream still uses it."""
        self._stream.wait_stream(self._module.current_stream(self.device))

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See `Backend.pinned`."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def stream(self) -> AbstractContextManager[Any]:
        """See `Backend.stream`."""
        context: AbstractContextManager[Any] = self._module.stream(self._stream)
        return context

    def record(self) -> Mark:
        """See `Backend.record`."""
        event: Mark = self._module.Event()
        event.record(self._stream)  # type: ignore[attr-defined]
        return event

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        self._stream.synchronize()


class PlainBackend:
    """A device without streams (mps): ordinary, blocking copies from pageable staging."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)

    def reserve(self, nbytes: int) -> None:
        """See `Backend.reserve`."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Backend.empty`."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def begin(self) -> None:
        """See `Backend.begin`; there is one order only."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See `Backend.pinned`; here it is ordinary memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def stream(self) -> AbstractContextManager[Any]:
        """See `Backend.stream`; there is only the default one."""
        return nullcontext()

    def record(self) -> Mark:
        """See `Backend.record`; waits for the whole device."""
        return self

    def query(self) -> bool:
        """See `Mark.query`; nobody can tell."""
        return False

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        self._module.synchronize()


def backend_for(device: torch.device) -> Backend:
    """The backend of a device that is not the CPU."""
    module: Any = torch.get_device_module(device)
    if all(hasattr(module, name) for name in ("Stream", "stream", "current_stream", "Event")):
        return TorchBackend(device)
    return PlainBackend(device)


def same_device(device: torch.device, wanted: torch.device) -> bool:
    """Whether ``wanted`` names ``device``; without an index it names the current one of its kind."""
    if device.type != wanted.type or device.type == "cpu":
        return device.type == wanted.type
    index = torch.get_device_module(wanted).current_device() if wanted.index is None else wanted.index
    return (device.index or 0) == index


def require_devices(decisions: Decisions) -> None:
    """Raise PlanError, before anything is written, when a device that the plan names can't be used."""
    problems = []
    for device in dict.fromkeys(row.device for row in decisions.rows):
        if device != "cpu":
            try:
                torch.empty(1, device=device)
            except Exception as error:
                first = next(row for row in decisions.rows if row.device == device)
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                problems.append(
                    Problem(
                        f"the device {device} can't be used",
                        fqn=first.fqn,
                        found=text,
                        hint="name a device that is there, in device or device_map",
                    )
                )
    if problems:
        raise PlanError(f"{decisions.module} can't be placed; nothing was changed", problems)
