"""Captures of one model in several threads, in every order of the lines at which hooks come and go.

A thread can lose its turn in torch's own ``Module.__call__`` too, in the midst of going through a module's hooks.
"""

from __future__ import annotations

import contextvars
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from tests.interleavings.explorer import explore
from tests.interleavings.stand_ins import stand_in
from torch import nn
from torch.nn.modules import module as torch_module

import weightlift as wl
from weightlift import locks
from weightlift.capture import actions, compiled, forwards, hooks, select, session

recorder = sys.modules[wl.recorder.__module__]
MODULES = (locks, forwards, hooks, select, session, recorder, compiled)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    stand_in(monkeypatch, *MODULES)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return self.layer(x)


def _scene(*kinds):
    """Threads that forward a number of their own through one model, each with its capture or without one."""

    def scene():
        model = _Model()

        def run(number, kind):
            x = torch.full((1,), float(number))
            if kind == "plain":
                assert model(x) is x
                return
            taken = {"got": "layer"} if kind == "output" else {"got": wl.Input("layer")}
            with wl.capture(model, **taken) as got:
                model(x)
            assert got["got"] == (x,)

        def check():
            layer = model.layer
            assert not layer._forward_hooks and not layer._forward_pre_hooks
            assert not layer._forward_hooks_with_kwargs and not layer._forward_pre_hooks_with_kwargs
            assert not hooks._open

        return [lambda number=number, kind=kind: run(number, kind) for number, kind in enumerate(kinds)], check

    return scene


@pytest.mark.parametrize("kinds", [("output", "plain"), ("output", "output"), ("input", "output")], ids="-".join)
def test_hooks_come_and_go(kinds):
    assert explore(_scene(*kinds), inside=[forwards, hooks, select, session, torch_module], preemptions=1).complete


def test_a_capture_opened_while_a_forward_begins_is_asked():
    def scene():
        modules, x = [nn.Identity(), nn.Identity()], torch.zeros(1)
        later = {id(module): SimpleNamespace(index=None) for module in modules}
        open_one = SimpleNamespace(grad=False, closed=False, raw=[], held=modules, numbers=itertools.count(), after={})
        owner = SimpleNamespace(
            attached=False, gathers=False, simple={}, simple_later=later, likely=tuple, expected=["one", "two"],
            expected_first=[None, None],
        )  # fmt: skip
        context = contextvars.Context()
        context.run(session.open_sessions.set, (open_one,))
        forward = context.run(forwards.Forward, open_one, owner, None, 0, True, False)
        context.run(forwards.running.set, forward)
        assert forward.due[1] == "one"

        def begin():
            context.run(hooks.after_forward, modules[0], (), x)
            forward.has_begun()

        def check():
            noted = len(open_one.raw)
            context.run(hooks.after_forward, modules[1], (), x)
            assert len(open_one.raw) == noted, "it was noted without asking the other capture"

        return [begin, forward.ask_all], check

    assert explore(scene, inside=[forwards, hooks, session], preemptions=2).complete


def test_a_recorder_that_two_threads_find_out_of_date():
    def scene():
        model = nn.Sequential(nn.Identity(), nn.Identity())
        record = wl.recorder(model, got="*")
        model.append(nn.Identity())  # what was built for it does not fit any more

        def run(number):
            x = torch.full((1,), float(number))
            out, got = record(x)
            assert out is x and got["got"] == (x, x, x)

        return [lambda: run(0), lambda: run(1)], lambda: None

    ours = [module for name, module in sorted(sys.modules.items()) if name.startswith("weightlift.capture")]
    assert explore(scene, inside=ours, preemptions=1).complete


class _Failing(_Model):
    def forward(self, x):
        x = self.layer(x)
        if x < 0:
            raise ValueError("as it was asked to")
        return x


@pytest.mark.parametrize(
    ("options", "other"), [({}, 1.0), ({"clone": True}, 1.0), ({"clone": True}, -1.0)],
    ids=["plain beside one", "clone beside one", "beside a failing one"],
)  # fmt: skip
def test_a_forward_that_fails_takes_no_record_of_another_one_along(options, other):
    """Threads in copies of one capture's context."""

    def scene():
        model = _Failing()
        taken = wl.capture(model, got=wl.Output("layer", **options))
        outside = contextvars.copy_context()
        got = outside.run(taken.__enter__)
        outside.run(model, torch.tensor(7.0))

        def run(context, number):
            if number > 0:
                context.run(model, torch.tensor(number))
                return
            with pytest.raises(ValueError, match="as it was asked to"):
                context.run(model, torch.tensor(number))

        def check():
            outside.run(taken.__exit__, None, None, None)
            assert got["got"] == ((7.0, other) if other > 0 else (7.0,))

        contexts = outside.copy(), outside.copy()
        return [lambda: run(contexts[0], -2.0), lambda: run(contexts[1], other)], check

    # Between two that fail at their leisure; what comes while one fails, at every bytecode.
    assert explore(scene, inside=[session], preemptions=1 if other > 0 else 2, opcodes=other > 0).complete


def test_a_call_that_is_wanted_by_its_number_is_one():
    def scene():
        model = _Model()
        taken = wl.capture(model, got=wl.Output("layer", calls=[0]))
        outside = contextvars.copy_context()
        got = outside.run(taken.__enter__)

        def check():
            outside.run(taken.__exit__, None, None, None)
            assert len(got["got"]) == 1

        contexts = outside.copy(), outside.copy()
        return [lambda: contexts[0].run(model, 1.0), lambda: contexts[1].run(model, 2.0)], check

    assert explore(scene, inside=[actions, session], preemptions=1, opcodes=True).complete


def test_two_forwards_of_one_capture_are_stopped():
    def scene():
        model, after = _Model(), []
        model.register_forward_hook(lambda module, args, output: after.append(output))
        taken = wl.capture(model, got=wl.Output("layer", stop=True))
        outside = contextvars.copy_context()
        got = outside.run(taken.__enter__)

        def run(context, number):
            with pytest.raises(session.Stopped):
                context.run(model, torch.tensor(number))

        def check():
            outside.run(taken.__exit__, None, None, None)
            assert sorted(got["got"]) == [1.0, 2.0] and not after

        contexts = outside.copy(), outside.copy()
        return [lambda: run(contexts[0], 1.0), lambda: run(contexts[1], 2.0)], check

    assert explore(scene, inside=[session], preemptions=2).complete


@pytest.mark.full
@pytest.mark.parametrize(
    "kinds", [("output", "plain"), ("output", "output"), ("output", "input", "plain")], ids="-".join
)
def test_hooks_come_and_go_with_two_preemptions(kinds):
    explored = explore(_scene(*kinds), inside=[hooks, torch_module], preemptions=2, limit=50_000)
    assert explored.orders > 1000
