"""Small tensors that were initialised or kept can be resized after a load, as those of an ordinary module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.transfer.settle import SMALL_BYTES


class Grows(nn.Module):
    """Buffers that a forward resizes, as torch's observers and normflows have them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3).t())
        self.weight.tag = "mine"
        self.register_buffer("u", torch.ones(3))
        self.register_buffer("empty", torch.tensor([]))
        self.register_buffer("kept", torch.arange(4.0), persistent=False)
        self.register_buffer("sampled", torch.randn(4) * 2)

    def forward(self, n: int) -> None:
        for name in ("u", "empty", "kept", "sampled"):
            before = getattr(self, name).clone()
            getattr(self, name).resize_(n)
            assert torch.equal(getattr(self, name)[: len(before)], before)


def by_missing(build: Callable[[], nn.Module]) -> nn.Module:
    return wl.load(build, {}, strict=False)


def by_materialize(build: Callable[[], nn.Module]) -> nn.Module:
    return wl.defer(build).materialize()


def by_cast(build: Callable[[], nn.Module]) -> nn.Module:
    return wl.load(build, {}, strict=False, dtype=torch.float64)


@pytest.mark.parametrize("load", [by_missing, by_materialize, by_cast])
def test_initialised_and_kept_tensors_can_be_resized(load: Any) -> None:
    module = load(Grows)
    module(9)
    assert module.u.shape == (9,)
    assert module.weight.stride() == (1, 3)
    assert module.weight.tag == "mine" and module.weight.requires_grad and module.weight.is_leaf
    assert torch.equal(module.kept[:4], torch.arange(4.0, dtype=module.kept.dtype))


def test_copied_tensors_can_be_resized(tmp_path: Path) -> None:
    torch.save(Grows().state_dict(), tmp_path / "model.pt")
    wl.load(Grows, tmp_path / "model.pt", copy=True)(9)


def test_observers_of_torch_run_after_a_load() -> None:
    build = lambda: torch.ao.quantization.PerChannelMinMaxObserver()  # noqa: E731
    observer = wl.load(build, {}, strict=False)
    observer(torch.randn(5, 7))
    assert observer.min_val.shape == (5,)


class Views(nn.Module):
    """Tensors of one storage: a tie, views, a transposed and a conjugated one."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.zeros(4, 4, dtype=torch.complex64)
        whole.fill_(1 + 2j)
        self.register_buffer("whole", whole)
        self.register_buffer("tie", whole)
        self.register_buffer("turned", whole.t())
        self.register_buffer("part", whole[1:3, 1:])
        self.register_buffer("other", whole.conj()[2:])
        self.parameter = nn.Parameter(whole[3])


@pytest.mark.parametrize("load", [by_missing, by_materialize])
def test_what_shares_a_storage_moves_together(load: Any) -> None:
    module, wanted = load(Views), Views()
    module.whole[3, 3] = wanted.whole[3, 3] = 5 - 7j
    for (name, tensor), (_, expected) in zip(module.state_dict().items(), wanted.state_dict().items(), strict=True):
        assert torch.equal(tensor, expected), name
        assert tensor.stride() == expected.stride() and tensor.storage_offset() == expected.storage_offset()
        assert tensor.is_conj() == expected.is_conj()
        assert tensor.untyped_storage().data_ptr() == module.whole.untyped_storage().data_ptr()
        assert tensor.untyped_storage().resizable()
    assert module.tie is module.whole


def test_what_others_see_stays_where_it_is() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.arange(4.0))
            self.register_buffer("b", torch.arange(4.0))
            self.outside = [self.a[1:]]
            self.array = self.b.numpy()

    module = by_missing(Seen)
    module.a.zero_()
    module.b.zero_()
    assert not module.outside[0].any() and not module.array.any()


@pytest.mark.parametrize("size", [SMALL_BYTES // 4, SMALL_BYTES // 4 + 1])
def test_only_small_ones_are_moved(size: int) -> None:
    def build() -> nn.Module:
        module = nn.Module()
        module.register_buffer("a", torch.ones(size))
        return module

    module = by_missing(build)
    assert module.a.untyped_storage().resizable() == (size <= SMALL_BYTES // 4)


def test_objects_and_versions_stay() -> None:
    held: list[torch.Tensor] = []

    def build() -> nn.Module:
        module = nn.Linear(3, 3)
        held.append(module.weight)
        return module

    module = by_materialize(build)
    assert module.weight is held[0]
    assert module.weight.untyped_storage().resizable()
    before = module.weight._version
    module(torch.ones(1, 3)).sum().backward()
    assert module.weight.grad is not None and module.weight._version == before
