"""What a constructor computes from memory that is read in place: before the reads, and from the values of then."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightlift as wl

SIZE = 256
LOADS = 12  # one alone went wrong three times of four


class ViewAndTable(nn.Module):
    """A buffer shows a weight; another one, which no checkpoint has, is computed from it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE)
        self.register_buffer("row", self.first.weight.detach()[1])
        self.register_buffer("computed", torch.cumsum(self.first.weight.detach(), 0), persistent=False)


class Twin(nn.Module):
    """Two Parameters on one storage, and a third one that is computed from it."""

    looked_at = False

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(SIZE, SIZE)
        self.second = nn.Linear(SIZE, SIZE, bias=False)
        self.second.weight = nn.Parameter(self.first.weight)
        if self.looked_at:
            assert float(self.first.weight.detach().sum()) != 0
        self.computed = nn.Parameter(self.first.weight.detach().mean(0))


class ReadBefore(Twin):
    """The constructor has looked at the weight, so that it has its first values by then."""

    looked_at = True


@pytest.mark.parametrize("build", [ViewAndTable, Twin, ReadBefore])
@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_it_is_done_before_the_reads(tmp_path, build, copy, kind):
    state = {name: torch.randn_like(value) for name, value in build().state_dict().items() if name != "computed"}
    if "row" in state:
        state["row"] = state["first.weight"][1].clone()
    else:
        state["second.weight"] = state["first.weight"].clone()
    save_file(state, tmp_path / "a.safetensors")
    source = state if kind == "mapping" else tmp_path
    wanted = wl.defer(build, seed=3).materialize().computed
    for _ in range(LOADS):
        loaded = wl.load(build, source, strict=False, seed=3, copy=copy, workers=8)
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items() if name in state)
        assert torch.equal(loaded.computed, wanted)
