"""Tensors whose elements share memory: windows are filled as ``load_state_dict`` fills them, expanded ones are not."""

import pytest
import torch
from torch import nn

import weightlift as wl

WINDOWS = {
    "unfold": lambda: torch.arange(6.0).unfold(0, 3, 1),
    "unfold by two": lambda: torch.arange(12.0).unfold(0, 4, 2),
    "turned": lambda: torch.arange(6.0).unfold(0, 3, 1).T,
    "as_strided": lambda: torch.arange(10.0).as_strided((3, 3), (1, 2)),
    "three dims": lambda: torch.arange(400.0).as_strided((5, 6, 7), (3, 11, 2), 4),
    "not all of its storage": lambda: torch.arange(12.0).as_strided((4, 3), (1, 1)),
    "whole numbers": lambda: torch.arange(6).unfold(0, 3, 1),
    "conjugated": lambda: torch.arange(6.0).to(torch.complex64).unfold(0, 3, 1).conj(),
    "large": lambda: torch.arange(70_000.0).unfold(0, 3, 1),
}


class Windows(nn.Module):
    def __init__(self, kind, *, hooked=False, whole=False):
        super().__init__()
        window = WINDOWS[kind]() if kind in WINDOWS else torch.arange(3.0).expand(2, 3)
        if whole:
            size = window.untyped_storage().nbytes() // window.element_size()
            self.whole = nn.Parameter(window.as_strided((size,), (1,), 0))
        self.register_buffer("window", window)
        self.register_buffer("other", torch.zeros(2))
        if hooked:
            self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.update(other=torch.ones(2)))


def values(kind, *, agreeing):
    made = Windows(kind).window
    if agreeing:
        return made.clone() + 1
    return (torch.rand(made.shape, generator=torch.Generator().manual_seed(0)) * 100).to(made.dtype)


@pytest.mark.parametrize("source", ["mapping", "file"])
@pytest.mark.parametrize("hooked", [False, True], ids=["no hooks", "hooks"])
@pytest.mark.parametrize("agreeing", [True, False], ids=["agreeing", "contradicting"])
@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_gets_what_load_state_dict_gives_it(kind, agreeing, hooked, source, tmp_path):
    if kind == "large" and not agreeing:
        pytest.skip("which value stays is up to torch's threads")
    state = {"window": values(kind, agreeing=agreeing), "other": torch.ones(2)}
    wanted = Windows(kind, hooked=hooked)
    wanted.load_state_dict(state)
    given = state
    if source == "file":
        torch.save({name: tensor.resolve_conj() for name, tensor in state.items()}, given := tmp_path / "model.pt")
    existing = Windows(kind, hooked=hooked)
    memory = existing.window.data_ptr()
    for loaded in (
        wl.load(existing, given),
        wl.load(lambda: Windows(kind, hooked=hooked), given),
        wl.load(lambda: Windows(kind, hooked=hooked), given, defer=False),
    ):
        assert torch.equal(loaded.window, wanted.window) and torch.equal(loaded.other, wanted.other)
        assert loaded.window.stride() == wanted.window.stride()
    assert existing.window.data_ptr() == memory


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_loads_its_own_state(kind):
    module = Windows(kind)
    assert torch.equal(wl.load(module, module.state_dict()).window, WINDOWS[kind]())


@pytest.mark.parametrize("make", [lambda build: build(), lambda build: build], ids=["existing", "callable"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("kind", ["unfold", "as_strided", "three dims"])
def test_a_window_of_a_weight_stays_one_and_is_checked_against_it(kind, dtype, make):
    build = lambda: Windows(kind, whole=True)  # noqa: E731
    state = {name: tensor.clone() for name, tensor in build().state_dict().items()}
    state["whole"] += 1
    with pytest.raises(wl.PlanError, match="window: tied to whole"):
        wl.load(make(build), state, dtype=dtype)
    state["window"] += 1
    loaded = wl.load(make(build), state, dtype=dtype)
    assert torch.equal(loaded.window, state["window"].to(loaded.window.dtype))
    assert loaded.window.untyped_storage().data_ptr() == loaded.whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("hooked", [False, True], ids=["no hooks", "hooks"])
@pytest.mark.parametrize("make", [lambda build: build(), lambda build: build], ids=["existing", "callable"])
def test_an_expanded_buffer_is_refused_in_the_plan_and_by_torch(make, hooked):
    build = lambda: Windows("expanded", hooked=hooked)  # noqa: E731
    state = {"window": torch.rand(2, 3), "other": torch.ones(2)}
    with pytest.raises(RuntimeError, match="single memory location"):
        build().load_state_dict(state)
    (problem,) = wl.plan(make(build), state).problems
    assert problem.fqn == "window" and "as load_state_dict would need it, too" in str(problem)
