"""Parts of names that module and checkpoint have different words for: told once, with the key mapping that mends it."""

from __future__ import annotations

import logging
import random
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.cli.wording import as_flags
from weightlift.plan.exchanges import Exchange, Search, Wanted

State = dict[str, Any]


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)})
        self.mlp = nn.Linear(width, 2 * width)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("2d", nn.Linear(2, 3))
        self.x = nn.ModuleDict({"2d": nn.Linear(3, 4)})


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()


def changed(state: Mapping[str, Any], *pairs: tuple[str, str]) -> State:
    """The names after the regular expressions of a checkpoint's author."""
    found = dict(state)
    for pattern, name in pairs:
        found = {re.sub(pattern, name, key): value for key, value in found.items()}
    return found


def refused(build: Callable[[], nn.Module], state: State, **options: Any) -> wl.PlanError:
    with pytest.raises(wl.PlanError) as caught:
        wl.load(build, state, **options)
    return caught.value


def ready(text: str) -> dict[str, str]:
    """The key mapping that a message shows, as Python reads it."""
    found = re.search(r"pass key_mapping=(\{.*?\})", text)
    assert found is not None, text
    mapping = eval(found[1])
    assert isinstance(mapping, dict)
    return mapping


def loads(build: Callable[[], nn.Module], state: State, mapping: dict[str, str], right: Mapping[str, Any]) -> None:
    got = wl.load(build, state, key_mapping=mapping).state_dict()
    assert got.keys() == right.keys() and all(torch.equal(got[key], right[key]) for key in right)


@pytest.mark.parametrize(
    ("build", "pairs", "told", "mapping"),
    [
        (Net, [(r"^blocks\.", "layers.")], "'layers' in place of 'blocks'", {r"^layers\.": "blocks."}),
        (Net, [(r"\.attn\.", ".self_attn.")], "'self_attn' in place of 'attn'", {r"\.self_attn\.": ".attn."}),
        (Net, [(r"\bnorm\b", "ln")], "'ln' in place of 'norm'", {r"(^|\.)ln(?=\.|$)": r"\1norm"}),
        (Around, [(r"^model\.blocks\.", "n.h.")], "'n.h' in place of 'model.blocks'", {r"^n\.h\.": "model.blocks."}),
        (Around, [("^model.", "a.b-c.")], "'a.b-c' in place of 'model'", {r"^a\.b\-c\.": "model."}),
        (Net, [(r"(s\.\d+\.)", r"\1_orig_mod.")], "a further part '_orig_mod'", {r"\._orig_mod\.": "."}),
        (
            Around,
            [("^model", "net"), ("blocks", "h"), (r"\.qkv\.", ".c_attn.")],
            "'net' in place of 'model' and 'h' in place of 'blocks' and 'c_attn' in place of 'qkv'",
            {r"^net\.": "model.", r"\.h\.": ".blocks.", r"\.c_attn\.": ".qkv."},
        ),
        (Net, [(r"norm\.weight", "norm.gamma")], "'gamma' in place of 'weight'", {r"\.gamma$": ".weight"}),
        (Digits, [(r"\b2d\b", "fc")], "'fc' in place of '2d'", {r"(^|\.)fc(?=\.|$)": r"\g<1>2d"}),
    ],
)
def test_parts_with_other_names(
    build: Callable[[], nn.Module], pairs: list[tuple[str, str]], told: str, mapping: dict[str, str]
) -> None:
    right = build().state_dict()
    state = changed(right, *pairs)
    error = refused(build, state)
    text, moved = str(error), [key for key in right if key not in state]
    assert len(text.splitlines()) == 3 and told in text.splitlines()[1]
    assert f"all {len(moved)} missing names are in the checkpoint with" in text
    assert ready(text) == mapping
    assert len(error.problems) == 1 + 2 * len(moved) and all(problem.implied for problem in error.problems[1:])
    loads(build, state, ready(text), right)
    flags = shlex.split(as_flags(str(error.problems[0].hint)))
    assert dict(zip(flags[2::3], flags[3::3])) == mapping and flags[1::3] == ["--rename"] * len(mapping)


def test_nearly_all_of_them() -> None:
    state = changed(Net().state_dict(), (r"^blocks\.", "layers."))
    del state["head.weight"]
    state["extra.weight"] = torch.ones(2)
    text = str(refused(Net, state))
    lines = text.splitlines()
    assert "96 of 97 missing names are in the checkpoint with 'layers' in place of 'blocks'" in lines[1]
    assert "follow from this" in lines[2]
    assert {line.split()[1] for line in lines[3:]} == {"head.weight:", "extra.weight:"}
    plan = wl.plan(Net, state, key_mapping=ready(text))
    assert {problem.fqn or problem.key for problem in plan.problems} == {"head.weight", "extra.weight"}


def test_what_is_right_already_is_left_alone() -> None:
    def build() -> nn.Module:
        parts = {"encoder": {"layers": Block()}, "decoder": {"blocks": Block(6)}}
        return nn.ModuleDict({name: nn.ModuleDict(part) for name, part in parts.items()})

    right = build().state_dict()
    state = changed(right, (r"^decoder\.blocks", "decoder.layers"))
    text = str(refused(build, state))
    assert ready(text) == {r"^decoder\.layers\.": "decoder.blocks."}
    loads(build, state, ready(text), right)


def test_beside_a_key_mapping() -> None:
    right = Net().state_dict()
    state = {f"module.{key}": value for key, value in changed(right, ("^blocks", "layers")).items()}
    given = {r"^module\.": ""}
    text = str(refused(Net, state, key_mapping=given))
    assert ready(text) == {**given, r"^layers\.": "blocks."}
    loads(Net, state, ready(text), right)
    text = str(refused(Net, state, key_mapping=lambda key: key.removeprefix("module.")))
    assert "'layers' in place of 'blocks' — have key_mapping give them the module's names" in text


def test_a_pattern_that_the_key_mapping_has_already() -> None:
    right = Net().state_dict()
    for state in (
        {f"a.a.{key}": value for key, value in right.items()},
        changed(right, ("^blocks", "a.layers"), ("^(?!a)", "a.")),
    ):
        given = {r"^a\.": "", r"^layers\.": "layers."}
        loads(Net, state, ready(str(refused(Net, state, key_mapping=given))), right)


def test_one_of_tied_names_is_enough() -> None:
    def build() -> nn.Module:
        net = Net()
        net.head.weight = net.embed.weight
        return net

    right = build().state_dict()
    for name in ("embed.weight", "head.weight"):
        state = changed(right, (r"^(blocks|norm|embed|head)", r"net.\1"))
        del state[f"net.{name}"]
        state["net.mask"] = torch.ones(2, 2)
        state = changed(state, (r"^net\.blocks", "net.layers"))
        text = str(refused(build, state))
        assert "all 100 missing names are" in text
        assert "with 'net.layers' in place of 'blocks' and a further part 'net'" in text
        with pytest.raises(wl.PlanError, match=r"net\.mask: renamed to mask; no tensor"):
            wl.load(build, state, key_mapping=ready(text))
        loads(build, {key: value for key, value in state.items() if "mask" not in key}, ready(text), right)


def test_extra_state_follows() -> None:
    class WithExtra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"seen": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    def build() -> nn.Module:
        return nn.ModuleDict({"fc": WithExtra(2, 2), "other": nn.Linear(2, 3)})

    state = changed(build().state_dict(), (r"^fc\.", "linear."))
    text = str(refused(build, state))
    assert len(text.splitlines()) == 3
    wl.load(build, state, key_mapping=ready(text))


@pytest.mark.parametrize(
    "state",
    [
        {"b.weight": (3, 2), "b.bias": (3,), "c.weight": (3, 2), "c.bias": (3,)},
        {"b.weight": (3, 2), "b.bias": (3,), "a.c.weight": (3, 2), "a.c.bias": (3,)},
        {"b.weight": (2, 3), "b.bias": (3,)},
        {"b.weight": (3, 2), "c.bias": (3,)},
        {"b.weight": (3, 2)},
        {"b.c": (3, 2), "b.d": (3,)},
        {"0.weight": (3, 2), "0.bias": (3,)},
    ],
    ids=["two", "two in length", "another shape", "two words", "half", "single names", "a number"],
)
def test_nothing_is_guessed(state: dict[str, tuple[int, ...]]) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(2, 3), "other": nn.Linear(2, 2)})

    found = {f"other.{key}": value for key, value in nn.Linear(2, 2).state_dict().items()}
    error = refused(build, {**found, **{key: torch.ones(shape) for key, shape in state.items()}})
    assert "in the checkpoint with" not in str(error) and not any(problem.implied for problem in error.problems)


def test_what_two_explanations_share_is_told() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            for number in range(30):
                self.add_module(f"x{number}", nn.Linear(2, 3))

    def build() -> nn.Module:
        return nn.ModuleDict({"blocks": nn.ModuleList(Attention() for _ in range(3))})

    state = changed(build().state_dict(), ("blocks", "layers"), (r"\.q\.", ".query."), (r"\.k\.", ".key."))
    text = str(refused(build, state))  # which of query and key is q, shapes don't tell
    assert ready(text) == {r"^layers\.": "blocks."} and "180 of 186 missing names" in text
    state = changed(state, (r"\.query\.", ".q."))
    assert ready(str(refused(build, state))) == {r"^layers\.": "blocks.", r"\.key\.": ".k."}


def test_what_a_hook_renames_is_no_key() -> None:
    class Hooked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_load_state_dict_pre_hook(self.rename)

        def rename(self, module: nn.Module, state: State, prefix: str, *rest: object) -> None:
            for key in [key for key in state if key.startswith("old.")]:
                state[key.replace("old.", "newer.")] = state.pop(key)

    right = Net().state_dict()
    state = changed(right, (r"^blocks\.", "old."))
    assert "in the checkpoint with" not in str(refused(Hooked, state))  # keys have `old`, to which the hook comes first
    state = changed(right, (r"^blocks\.", "layers."))
    loads(Hooked, state, ready(str(refused(Hooked, state))), right)


def test_without_strict_the_warning_says_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "weightlift"):
        wl.load(Net, changed(Net().state_dict(), ("^blocks", "layers")), strict=False)
    (record,) = caplog.records
    assert "'layers' in place of 'blocks'" in record.getMessage()
    assert r'key_mapping={r"^layers\.": "blocks."}' in record.getMessage()


@pytest.mark.parametrize("seed", range(40))
def test_a_hint_puts_everything_right(seed: int) -> None:
    """Whatever parts are renamed: if a hint is given, then passing it gives the values back where they were."""
    chance = random.Random(seed)
    words = ["blocks", "norm", "attn", "mlp", "qkv", "out", "embed", "head", "weight", "bias"]
    others = ["layers", "ln", "self_attn", "ffn", "x", "mlp", "attn", "norm", "w"]
    right = {key: torch.randn_like(value) for key, value in Net().state_dict().items()}
    pairs = {chance.choice(words): chance.choice(others) for _ in range(chance.randint(1, 3))}
    state: State = {}
    for key, value in right.items():
        name = ".".join(pairs.get(part, part) for part in key.split("."))
        state["net." * (seed % 4 == 0) + name] = value
    if len(state) < len(right) or state.keys() == right.keys():
        return
    text = str(refused(Net, state))
    if "of" in text.partition(" missing names are")[0] or "pass key_mapping={" not in text:
        return
    loads(Net, state, ready(text), right)


def test_the_work_does_not_grow_with_the_layers() -> None:
    def search(layers: int) -> Search:
        missing, given = {}, {}
        for layer in range(layers):
            for number, word in enumerate(["norm", "q", "k", "v", "o", "up", "down"]):
                missing[f"blocks.{layer}.{word}.weight"] = Wanted((1 + number // 2,), (layer, word))
                given[f"layers.{layer}.{word}.weight"] = (1 + number // 2,)
        found = Search(missing, given, ["head.weight"])
        assert found.best() == [frozenset([Exchange(("layers",), ("blocks",), leading=False)])]
        return found

    assert len(search(2)._tried) == len(search(500)._tried) < 10


def test_a_search_without_an_end_is_given_up() -> None:
    missing = {f"a{number}.b{number}.c.weight": Wanted((2,), number) for number in range(40)}
    given = {f"d{number}.e{number}.f.weight": (2,) for number in range(40)}
    search = Search(missing, given, [])
    assert search.best() == [] and len(search._tried) < 400
