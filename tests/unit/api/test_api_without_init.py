"""A class that never calls ``super().__init__()``: said so, instead of an attribute that nobody has heard of."""

import pytest
from torch import nn

import weightlift as wl


class Bare(nn.Module):
    def __init__(self):
        pass


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2), Bare()])


@pytest.mark.parametrize("call", [
    wl.defer,
    lambda build: wl.load(build, {}),
    lambda build: wl.load(build, {}, defer=False),
    lambda build: wl.plan(build(), {}),
], ids=["defer", "load", "not deferred", "existing"])  # fmt: skip
@pytest.mark.parametrize("build", [Bare, Holds])
def test_the_class_is_named(build, call):
    with pytest.raises(TypeError, match=r"the Bare.* lacks super\(\).__init__\(\)"):
        call(build)


def test_its_place_is_named():
    with pytest.raises(TypeError, match=r"the Bare at parts\.1 "):
        wl.defer(Holds)
