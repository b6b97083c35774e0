"""torch reads a generator's state under a lock that it waits for without letting the interpreter go.

Two threads in ``torch.get_rng_state()`` wait for each other when the garbage collector runs within it and a finaliser
(that of an ``mmap``) lets the interpreter lock go: one in 217 processes of eight threads that load hung so. Loading
therefore never asks for the state of the process's generator.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

import weightlift as wl


class _Seeding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        torch.manual_seed(5)
        self.register_buffer("table", torch.randn(4, 4))
        self.last = nn.Parameter(nn.init.trunc_normal_(torch.empty(4, 4)))


def test_no_generator_state_is_read() -> None:
    seen: list[str] = []

    def profile(frame: FrameType, event: str, what: Any) -> None:
        if event == "c_call":
            seen.append(what.__name__)

    checkpoint = _Seeding().state_dict()
    state = torch.get_rng_state()
    sys.setprofile(profile)
    try:
        wl.load(_Seeding, checkpoint)
    finally:
        sys.setprofile(None)
    torch.set_rng_state(state)
    assert "initial_seed" in seen  # the profile does see calls of this kind
    assert not {"get_state", "set_state", "clone_state"} & set(seen)
