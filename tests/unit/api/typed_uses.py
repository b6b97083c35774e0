"""What a type checker makes of `load`, `plan` and `defer`: mypy checks this file, and nothing runs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

import weightlift as wl

if TYPE_CHECKING:
    from typing_extensions import assert_type


class Net(nn.Module):
    """A module of a user's."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)


def build() -> Net:
    """What builds one."""
    return Net()


def uses(net: Net, module: nn.Module, either: Net | Callable[[], Net], kind: type[Net]) -> None:
    """Each returns what it is given, or what that builds, and never ``Any``."""
    assert_type(wl.load(net, "x"), Net)
    assert_type(wl.load(module, "x", strict=False), nn.Module)
    assert_type(wl.load(Net, "x"), Net)
    assert_type(wl.load(kind, "x"), Net)
    assert_type(wl.load(build, "x", dtype="bfloat16"), Net)
    assert_type(wl.load(lambda: Net(8), net.state_dict(), copy=True), Net)
    assert_type(wl.load(partial(Net, 8), "x"), Net)
    assert_type(wl.load(either, "x"), Net)
    assert_type(wl.plan(net, "x"), wl.LoadPlan[Net])
    assert_type(wl.plan(Net, "x", mesh_shape={"fsdp": 2}).execute(), Net)
    assert_type(wl.defer(Net).load("x"), Net)


def mistakes(net: Net) -> None:
    """What is refused when it runs is refused before; mypy complains of an ignored error that is none."""
    wl.load(net, "x", copi=True)  # type: ignore[call-overload]
    wl.load(net, "x", key_mapping=[("a", "b")])  # type: ignore[call-overload]
    wl.load("x", net)  # type: ignore[call-overload]
    wl.load(lambda: 3, "x")  # type: ignore[type-var]
