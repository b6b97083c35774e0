"""How errors are told: one line for what repeated layers have in common, everything in `problems`."""

from pathlib import Path

import pytest
from torch import nn

import weightlift as wl
from weightlift.errors import Problem, told

FILE = Path("model.safetensors")


def missing(*names, what="is missing"):
    return [Problem(what, fqn=name, hint=f"look for {name}; or not") for name in names]


def at(start, key, **more):
    return Problem("too much", key=key, file=FILE, start=start, end=start + 4, **more)


def test_layers_with_the_same_problem_are_one_line():
    assert told(missing(*(f"layers.{n}.w" for n in range(4)))) == [
        "- layers.{0…3}.w ×4: is missing — look for layers.{0…3}.w; or not"
    ]
    assert told([at(4 * n, f"a.{n}.w", fqn=f"b.{n}.w") for n in (0, 2, 5)]) == [
        "- 3 ranges of model.safetensors: b.{0,2,5}.w ×3 (key a.{0,2,5}.w): too much"
    ]


def test_it_stands_where_the_first_of_them_did():
    names = [f"layers.{n}.{kind}" for n in range(3) for kind in ("w", "b")]
    lines = [line.split(":")[0] for line in told(missing("first", *names, "last"))]
    assert lines == ["- first", "- layers.{0…2}.w ×3", "- layers.{0…2}.b ×3", "- last"]


@pytest.mark.parametrize(
    "problems",
    [
        missing("layers.0.w", "layers.1.w"),
        missing("a.w", "b.w", "c.w"),
        [*missing("layers.0.w", "layers.1.w"), *missing("layers.2.w", what="is odd")],
        [at(0, "layers.0.w", found="[1]"), at(4, "layers.1.w", found="[2]"), at(8, "layers.2.w", found="[3]")],
        [at(0, "layers.0.w"), at(4, "layers.0.w"), at(8, "layers.0.w")],
        [Problem("no name")] * 3,
    ],
    ids=["few", "names", "what", "found", "the same tensor", "no name"],
)
def test_what_differs_in_more_is_told_one_by_one(problems):
    assert told(problems) == [f"- {problem}" for problem in problems]


def test_what_follows_comes_after_what_it_follows_from():
    implied = [Problem("too much", key=f"layers.{n}.w", implied=True) for n in range(3)]
    own = missing(*(f"layers.{n}.w" for n in range(3)))
    (line,) = told(own)
    assert told([*own, *implied]) == [line, "  (3 of the problems follow from this; all are in `.problems`)"]
    assert told([*implied, *missing("last")])[1:] == ["- last: is missing — look for last; or not"]


def test_a_model_of_many_layers_gets_a_short_error():
    def build(width):
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(width, 2) for _ in range(50))})

    with pytest.raises(wl.PlanError) as caught:
        wl.load(lambda: build(3), build(4).state_dict())
    assert len(caught.value.problems) == 50 and len(str(caught.value).splitlines()) == 2
    assert "layers.{0…49}.weight ×50: the shapes differ" in str(caught.value)


@pytest.mark.timeout(120)
def test_telling_grows_with_the_number_of_problems_not_with_its_square():
    (line,) = told(missing(*(f"layers.{n}.w" for n in range(100_000))))
    assert line.startswith("- layers.{0…99999}.w ×100000: ")
