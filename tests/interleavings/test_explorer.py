"""The explorer itself: it finds mistakes that need a certain order, tells which, and tries every order there is."""

from __future__ import annotations

import re

import pytest
from tests.interleavings import victims
from tests.interleavings.explorer import Run, explore
from tests.interleavings.stand_ins import stand_in


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    stand_in(monkeypatch, victims)


def _scene_of_two(kind, first, second, check):
    def scene():
        one = kind()
        return [lambda: getattr(one, first)(), lambda: getattr(one, second)()], lambda: check(one)

    return scene


def _counted(counter):
    assert counter.value == 2


def _made_once(once):
    assert once.made == 1


@pytest.mark.parametrize("opcodes", [False, True])
@pytest.mark.parametrize(
    ("kind", "first", "second", "check", "message"),
    [
        (victims.Counter, "add", "add", _counted, "assert 1 == 2"),
        (victims.Once, "get", "get", _made_once, "assert 2 == 1"),
        (victims.Twisted, "forwards", "backwards", lambda _: None, "no thread can go on"),
        (victims.Forgetful, "wait", "tell", lambda _: None, "no thread can go on"),
    ],
)
def test_what_it_finds(kind, first, second, check, message, opcodes):
    scene = _scene_of_two(kind, first, second, check)
    assert explore(scene, inside=[victims], preemptions=0, opcodes=opcodes).complete  # one after the other it is right
    with pytest.raises(AssertionError, match=re.escape(message)):
        explore(scene, inside=[victims], preemptions=1, opcodes=opcodes)


def test_two_preemptions_find_what_one_does_not():
    def seen(flickering):
        assert flickering.seen != (True, False)

    scene = _scene_of_two(victims.Flickering, "flicker", "look", seen)
    assert explore(scene, inside=[victims], preemptions=1).complete
    with pytest.raises(AssertionError):
        explore(scene, inside=[victims], preemptions=2)


def test_the_choices_repeat_the_run():
    scene = _scene_of_two(victims.Counter, "add", "add", _counted)
    with pytest.raises(AssertionError) as told:
        explore(scene, inside=[victims], preemptions=1)
    made = dict(re.findall(r"(\d+): (\d+)", str(told.value).split("choices")[1].split("}")[0]))
    choices = [int(made.get(str(at), 0)) for at in range(max(map(int, made)) + 1)]
    for _ in range(3):
        bodies, check = scene()
        Run(choices, files={victims.__file__}, opcodes=False, preemptions=1, every=1).go(bodies)
        with pytest.raises(AssertionError):
            check()


def test_how_many_orders_there_are():
    """Two threads of two places each: 6 orders of the four, of which 2 without a preemption."""
    found = set()

    def scene():
        counter, order = victims.Counter(), []
        bodies = [lambda: (order.append("a"), counter.add(), order.append("A"))]
        bodies.append(lambda: (order.append("b"), counter.add(), order.append("B")))
        return bodies, lambda: found.add(tuple(order))

    assert explore(scene, inside=[victims], preemptions=0).orders == 2
    assert found == {("a", "A", "b", "B"), ("b", "B", "a", "A")}
    everything = explore(scene, inside=[victims], preemptions=99)
    assert everything.complete
    # Before each of its two lines a thread can lose its turn, and its end passes it on: the ways to interleave
    # three steps with three.
    assert everything.orders == 20
