"""Names that differ by one prefix: told once, with the key mapping that takes it off or puts it there."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.cli.wording import as_flags


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Tied()


class WithExtra(nn.Linear):
    def get_extra_state(self) -> object:
        return {"seen": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def named(state: Mapping[str, Any], before: str) -> dict[str, Any]:
    return {before + key: value for key, value in state.items()}


def ready(text: str) -> dict[str, str]:
    """The key mapping that a message shows, as Python reads it."""
    found = re.search(r"pass key_mapping=(\{.*?\})", text)
    assert found is not None, text
    mapping = eval(found[1])
    assert isinstance(mapping, dict)
    return mapping


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net-1.", 'a"b.', "a\\b.", "0."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_on_every_key(prefix: str) -> None:
    state = Tied().state_dict()
    with pytest.raises(wl.PlanError) as caught:
        wl.load(Tied, named(state, prefix))
    text, problems = str(caught.value), caught.value.problems
    assert len(text.splitlines()) == 3
    assert f"missing names are in the checkpoint with a prefix {prefix!r}" in text.splitlines()[1]
    assert len(problems) == 1 + 2 * len(state)
    assert {problem.fqn for problem in problems[1:]} >= set(state)
    assert {problem.key for problem in problems[1:]} >= set(named(state, prefix))
    model = wl.load(Tied, named(state, prefix), key_mapping=ready(text))
    assert torch.equal(model.embed.weight, state["embed.weight"])


@pytest.mark.parametrize("left_out", ["head.weight", "embed.weight"])
def test_a_tied_name_that_the_checkpoint_lacks(left_out: str) -> None:
    state = {key: value for key, value in Tied().state_dict().items() if key != left_out}
    with pytest.raises(wl.PlanError) as caught:
        wl.load(Tied, named(state, "module."))
    assert len(str(caught.value).splitlines()) == 3
    wl.load(Tied, named(state, "module."), key_mapping=ready(str(caught.value)))


def test_a_prefix_that_the_module_has() -> None:
    state = Tied().state_dict()
    with pytest.raises(wl.PlanError) as caught:
        wl.load(Around, state)
    assert "without the prefix 'model.'" in str(caught.value).splitlines()[1]
    assert len(str(caught.value).splitlines()) == 3
    assert ready(str(caught.value)) == {"^": "model."}
    wl.load(Around, state, key_mapping={"^": "model."})


def test_what_is_left_over_is_told_one_by_one() -> None:
    state = {**named(Tied().state_dict(), "model."), "loss.weight": torch.ones(2), "epoch": 3}
    plan = wl.plan(Tied, state)
    lines = str(plan).split("problems:\n")[1].splitlines()
    assert len(lines) == 4
    assert "'model.'" in lines[0] and "follow from this" in lines[1]
    assert {line.split()[1] for line in lines[2:]} == {"loss.weight:", "epoch:"}
    assert plan.problems[0].implied is False and sum(problem.implied for problem in plan.problems) == 2 * len(state) - 4


def test_extra_state_follows_too() -> None:
    def build() -> nn.Module:
        return nn.Sequential(WithExtra(2, 2))

    with pytest.raises(wl.PlanError) as caught:
        wl.load(build, named(build().state_dict(), "module."))
    assert len(str(caught.value).splitlines()) == 3
    wl.load(build, named(build().state_dict(), "module."), key_mapping=ready(str(caught.value)))


def test_beside_a_key_mapping() -> None:
    state = named(Tied().state_dict(), "module.model.")
    given = {r"^module\.": ""}
    with pytest.raises(wl.PlanError) as caught:
        wl.load(Tied, state, key_mapping=given)
    assert ready(str(caught.value)) == {**given, r"^model\.": ""}
    wl.load(Tied, state, key_mapping=ready(str(caught.value)))
    with pytest.raises(wl.PlanError, match=r"'model\.' — have key_mapping take it off"):
        wl.load(Tied, state, key_mapping=lambda key: key.removeprefix("module."))


@pytest.mark.parametrize(
    "state",
    [
        {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2), "b.weight": torch.ones(2, 2), "b.bias": torch.ones(2)},
        {"a.weight": torch.ones(2, 2), "b.bias": torch.ones(2)},
        {"weight": torch.ones(2, 2), "a.bias": torch.ones(2), "a.weight": torch.ones(2, 2)},
        {"module.weight": torch.ones(2, 2)},
        {"xweight": torch.ones(2, 2), "xbias": torch.ones(2)},
    ],
    ids=["two prefixes", "not one prefix", "loaded already", "not all", "no prefix of a module"],
)
def test_no_prefix_is_made_up(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(wl.PlanError) as caught:
        wl.load(lambda: nn.Linear(2, 2), state)
    assert "prefix" not in str(caught.value)
    assert not any(problem.implied for problem in caught.value.problems)


def test_a_prefix_on_one_name() -> None:
    weight = torch.ones(2, 2)
    with pytest.raises(wl.PlanError) as caught:
        wl.load(lambda: nn.Linear(2, 2), {"weight": weight, "a.bias": torch.ones(2)})
    assert "bias, which is missing, is in the checkpoint with a prefix 'a.'" in str(caught.value)
    wl.load(lambda: nn.Linear(2, 2), {"weight": weight, "a.bias": torch.ones(2)}, key_mapping=ready(str(caught.value)))


def test_without_strict_the_warning_says_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "weightlift"):
        wl.load(Tied, named(Tied().state_dict(), "module."), strict=False)
    (record,) = caplog.records
    assert "with a prefix" in record.getMessage() and r'key_mapping={r"^module\.": ""}' in record.getMessage()


INNER = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
OTHER = {"x": torch.ones(1)}


@pytest.mark.parametrize(
    ("found", "path"),
    [
        ({"optimizer": {"state": {0: OTHER}}, "model": INNER}, "['model']"),
        ({"callbacks": OTHER, "optimizer_states": [], "state_dict": INNER, "epoch": 3}, "['state_dict']"),
        ({"ema": OTHER, "model_state_dict": INNER}, "['model_state_dict']"),
        ({"opt": {"state": {0: OTHER}}, "mine": INNER}, "['mine']"),
        ({"opt": OTHER, "model": {"args": 1, "state_dict": INNER}}, "['model']['state_dict']"),
    ],
)
@pytest.mark.parametrize("saved", [True, False])
def test_where_the_weights_of_a_nested_checkpoint_are(tmp_path: Path, found: Any, path: str, saved: bool) -> None:
    if saved:
        torch.save(found, tmp_path / "train.pt")
    with pytest.raises(wl.CheckpointError) as caught:
        wl.load(lambda: nn.Linear(2, 2), tmp_path / "train.pt" if saved else found)
    if saved:
        told = re.search(r"are inside: (open_checkpoint\(…, within=.*\)) reads them alone$", str(caught.value))
        assert told is not None
        call = told[1]
        opened = eval(call.replace("…", "path"), {"open_checkpoint": wl.open_checkpoint, "path": tmp_path / "train.pt"})
        assert torch.equal(opened.read("weight"), eval(f"found{path}")["weight"])
        wl.load(lambda: nn.Linear(2, 2), opened)
    else:
        assert str(caught.value).endswith(f"as in given{path}")
        wl.load(lambda: nn.Linear(2, 2), eval(f"found{path}"))


def test_averaged_weights_beside_the_others_are_told_as_one() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))

    state = build().state_dict()
    both = {**state, **{f"ema.{key}": value for key, value in state.items()}}
    with pytest.raises(wl.PlanError, match=r"all 6 keys that the module has no place for begin with 'ema\.'") as caught:
        wl.load(build, both)
    first, *rest = caught.value.problems
    assert [problem.key for problem in rest if problem.implied] == [f"ema.{key}" for key in state]
    assert str(caught.value).count("\n") == 2
    drop, flags = str(first.hint).partition("key_mapping=")[2], as_flags(str(first.hint))
    assert wl.load(build, both, key_mapping=eval(drop)) is not None
    assert "drop it, which takes Python: key_mapping=" in flags and "--no-strict" in flags
    few = {key: value for key, value in both.items() if "ema." not in key or "0" in key}
    for other in ({**both, "step": torch.ones(1)}, {key: both[key] for key in both if key != "0.bias"}, few):
        assert not any("no place for begin" in problem.what for problem in wl.plan(build, other).problems)
