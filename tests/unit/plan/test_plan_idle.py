"""Patterns that match nothing are said when a load is planned; what no pattern can be is refused in clear words."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import weightlift as wl


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.drop = nn.Dropout()
        self.norm = nn.LayerNorm(3)
        self.out = nn.Linear(3, 3)
        self.out.weight = self.layers[0].weight
        self.register_buffer("table", torch.ones(2), persistent=False)


STATE = Net().state_dict()


def warnings(caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    """What is said while a load is planned; nothing more may come when it is executed."""
    with caplog.at_level(logging.WARNING, "weightlift"):
        plan = wl.plan(Net, STATE, **options)
        said = [record.getMessage() for record in caplog.records]
        if not plan.problems:
            plan.execute()
    assert len(caplog.records) == len(said)
    return said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"key_mapping": {r"^module\.": ""}}, r"key_mapping['^module\\.'] matches no key of the checkpoint"),
        ({"dtype": {"layer.*": torch.float16}}, "dtype['layer.*'] matches no name of the module"),
        ({"dtype": {"norm": None, "*": None}}, "dtype['norm'] matches no name of the module, as a pattern stands for"),
        ({"device_map": {"layer": "cpu"}}, "is no name of the module or of a part of it; similar: layers"),
        ({"device_map": {"": "cpu", "layers.3": "cpu"}}, "device_map['layers.3'] is no name"),
        ({"device_map": {"layers.": "cpu"}}, "device_map['layers.'] is no name"),
        ({"device_map": {"layers.0.wei": "cpu"}}, "device_map['layers.0.wei'] is no name"),
    ],
)
def test_what_matches_nothing_is_said_once(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], expected: str
) -> None:
    (said,) = warnings(caplog, **options)
    assert said.startswith("<mapping> into Net: ") and expected in said


def test_all_of_it_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    dtype, mapping = {"a.*": None, "b.*": None}, {"q": "", "z": ""}
    (said,) = warnings(caplog, dtype=dtype, device_map={"c": "cpu"}, key_mapping=mapping)
    assert all(text in said for text in ("dtype['a.*']", "dtype['b.*']", "device_map['c']", "['q']", "['z']"))


@pytest.mark.parametrize(
    "options",
    [
        {"key_mapping": {"^layers": "layers", r"\.bias$": ".bias"}},
        {"key_mapping": {"^out": "x", "^x": "out"}},
        {"key_mapping": lambda key: key},
        {"dtype": {"layers.0.*": None, "out.weight": torch.float16, "table": None, "*": None, "*.bias": None}},
        {"dtype": torch.float16, "device_map": {"": "cpu"}},
        {"device_map": dict.fromkeys(["layers", "layers.0.bias", "drop", "norm", "table", ""], "cpu")},
    ],
)
def test_nothing_is_said_of_what_matches(caplog: pytest.LogCaptureFixture, options: dict[str, Any]) -> None:
    assert warnings(caplog, **options) == []


def test_a_refused_plan_says_it_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "weightlift"), pytest.raises(wl.PlanError):
        wl.load(Net, {f"model.{key}": value for key, value in STATE.items()}, key_mapping={r"^module\.": ""})
    assert len(caplog.records) == 1


def test_a_callable_is_asked_once_for_each_key() -> None:
    asked: list[str] = []
    state = Net().state_dict()  # with its _metadata
    state["epoch"] = 3  # type: ignore[assignment]

    def name_of(key: str) -> str | None:
        asked.append(key)
        return None if key == "epoch" else key

    wl.load(Net, state, key_mapping=name_of)
    assert asked == list(state)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"^a(": ""}, r"key_mapping: '\^a\(' is not a regular expression: missing \)"),
        ({"^a": r"\1"}, r"key_mapping: '\\\\1' is no replacement for '\^a': invalid group reference 1"),
        ({"^(?P<n>a)": r"\g<m>"}, r"key_mapping: .* is no replacement for .*: unknown group name 'm'"),
        ({"^nowhere": r"C:\data"}, r"is no replacement for '\^nowhere': bad escape \\d"),
    ],
)
def test_what_is_no_pattern_or_replacement(mapping: dict[str, str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        wl.load(Net, STATE, key_mapping=mapping)
