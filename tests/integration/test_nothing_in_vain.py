"""A hand-written module's initialisers do not run when the checkpoint has the weights: the calls are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightlift as wl
from weightlift.deferred.tape import Node


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.third = nn.Parameter(torch.randn(64, 64) * 0.02)
        nn.init.orthogonal_(self.first.weight)
        nn.init.trunc_normal_(self.second.weight, std=0.02)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the recorded calls that ran."""
    wl.defer(ByHand)  # the first construction of a process tries once what torch's trunc_normal_ does
    ran: list[str] = []
    execute = Node.execute

    def spy(node: Node, seed: int) -> None:
        ran.append(str(node.func))
        execute(node, seed)

    monkeypatch.setattr(Node, "execute", spy)
    return ran


def _state() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in ByHand().state_dict().items()}


@pytest.mark.parametrize("copy", [False, True])
def test_a_whole_checkpoint_runs_none(tmp_path: Path, counted: list[str], copy: bool) -> None:
    state = _state()
    save_file(state, tmp_path / "model.safetensors")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = wl.load(ByHand, tmp_path, copy=copy)
    assert counted == []
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("first.weight", "linalg_qr"),
        ("second.weight", "trunc_normal_"),
        ("third", "mul"),
    ],
)
def test_a_missing_weight_runs_its_own_alone(
    tmp_path: Path, counted: list[str], missing: str, expected: str
) -> None:
    state = _state()
    del state[missing]
    save_file(state, tmp_path / "model.safetensors")
    wl.load(ByHand, tmp_path, strict=False)
    assert any(expected in name for name in counted), counted
    others = {"linalg_qr", "trunc_normal_"} - {expected}
    assert not any(other in name for name in counted for other in others), counted
