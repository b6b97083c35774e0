"""Operators whose schemas, or whose results on ``meta``, do not say what they do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import weightlift as wl


class Made(nn.Module):
    """Holds as buffers what ``make`` gives."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        made = make()
        for number, value in enumerate(made if isinstance(made, (tuple, list)) else [made]):
            self.register_buffer(f"b{number}", value)


def norm(kind: type[nn.Module], *size: int, **options: Any) -> Callable[[], nn.Module]:
    """A layer that has seen two batches."""

    def build() -> nn.Module:
        layer = kind(4, **options)
        with torch.no_grad():
            for step in (1.0, 3.0):
                layer(torch.arange(float(torch.Size(size).numel())).view(size) * step)
        return layer

    return build


NORMS = {
    "batch": norm(nn.BatchNorm1d, 8, 4),
    "batch of images": norm(nn.BatchNorm2d, 2, 4, 3, 3, momentum=None),
    "without weights": norm(nn.BatchNorm1d, 8, 4, affine=False),
    "synchronised": norm(nn.SyncBatchNorm, 8, 4),
    "instance": norm(nn.InstanceNorm1d, 2, 4, 8, track_running_stats=True),
    "of many values": norm(nn.BatchNorm1d, 60_000, 4),
    "cast later": lambda: norm(nn.BatchNorm1d, 8, 4)().double(),
}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_that_a_constructor_has_run(name: str) -> None:
    build = NORMS[name]
    ordinary = build().state_dict()
    given = {"num_batches_tracked": ordinary["num_batches_tracked"]}
    deferred = wl.defer(build)
    assert not deferred.forced
    for ours in (deferred.materialize(), wl.load(build, given, strict=False)):
        assert ours.state_dict().keys() == ordinary.keys()
        for key, value in ours.state_dict().items():
            assert torch.equal(value, ordinary[key]), key


class Probes(nn.Module):
    """Reads, in its constructor, what a dummy forward leaves and gives."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4).train(training)
        out = self.bn(torch.full((8, 4), 5.0))
        self.level = out.sum().item()
        self.mean = self.bn.running_mean.mean().item()
        self.register_buffer("probe", out.detach(), persistent=False)
        self.kept = [self.bn(torch.full((2, 4), 3.0)).detach()]


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_whose_results_are_read(training: bool) -> None:
    ordinary = Probes(training)
    checkpoint = {key: torch.full_like(value, 9) for key, value in ordinary.state_dict().items()}
    for ours in (wl.load(lambda: Probes(training), checkpoint), wl.defer(lambda: Probes(training)).materialize()):
        assert (ours.level, ours.mean) == (ordinary.level, ordinary.mean)
        assert torch.equal(ours.probe, ordinary.probe) and torch.equal(ours.kept[0], ordinary.kept[0])
    assert wl.load(lambda: Probes(training), checkpoint).bn.running_mean.tolist() == [9] * 4


def test_a_dummy_forward_in_training_costs_nothing_where_the_statistics_are_loaded() -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(2000, 2000), nn.BatchNorm1d(2000))
        net.features = net(torch.zeros(2, 2000)).shape[1]
        return net

    deferred = wl.defer(build)
    assert not deferred.forced
    state = {key: torch.full_like(value, 2) for key, value in build().state_dict().items()}
    loaded = deferred.load(state)
    assert loaded.features == 2000 and all(torch.equal(loaded.state_dict()[key], state[key]) for key in state)


def test_a_result_that_is_none_of_what_is_written() -> None:
    make = lambda: nn.functional.rrelu(torch.linspace(-2, 3, 6), 0.2, 0.2)  # noqa: E731
    assert torch.equal(wl.defer(lambda: Made(make)).materialize().b0, make())


@torch.library.custom_op("weightlift_tests::doubled_", mutates_args=("x",))
def doubled_(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    return x.sum() + y


doubled_.register_fake(lambda x, y: torch.empty_like(y))


def test_an_operator_of_the_users_own_that_writes_and_returns() -> None:
    def make() -> list[torch.Tensor]:
        x = torch.ones(4)
        return [doubled_(x, torch.zeros(3)), x]

    ours = wl.defer(lambda: Made(make)).materialize()
    assert ours.b0.tolist() == [8.0] * 3 and ours.b1.tolist() == [2.0] * 4


def test_cuts_that_are_a_tensor() -> None:
    def make() -> list[torch.Tensor]:
        cuts = torch.zeros(2, dtype=torch.int64)
        cuts[0], cuts[1] = 1, 3
        parts = (*torch.tensor_split(torch.arange(5.0), cuts), *torch.arange(4.0).tensor_split(cuts[:1], dim=0))
        return [part.clone() for part in parts]

    ours = wl.defer(lambda: Made(make)).materialize()
    assert [value.tolist() for value in ours.buffers()] == [[0], [1, 2], [3, 4], [0], [1, 2, 3]]


def test_pieces_share_the_memory_that_they_are_of() -> None:
    def make() -> list[torch.Tensor]:
        whole = torch.ones(6)
        first, _ = torch.unsafe_chunk(whole, 2)
        first.zero_()
        return [whole]

    assert wl.defer(lambda: Made(make)).materialize().b0.tolist() == [0, 0, 0, 1, 1, 1]


def test_numbers_among_the_arguments_of_a_mapped_function() -> None:
    make = lambda: torch.vmap(lambda x: x * 2)(torch.ones(3))  # noqa: E731
    assert wl.defer(lambda: Made(make)).materialize().b0.tolist() == [2, 2, 2]


class Conjugated(nn.Module):
    """Reads what is computed from lazily conjugated views, and what torch computes by them."""

    def __init__(self) -> None:
        super().__init__()
        root = torch.complex(torch.arange(4.0).view(2, 2), torch.tensor([[1.0, 2.0], [0.5, 3.0]]))
        inverse = torch.linalg.pinv(root)
        self.value = inverse[1, 0].item()
        self.register_buffer("inverse", inverse)
        tall = torch.complex(torch.arange(8.0).view(4, 2).cos(), torch.arange(8.0).view(4, 2).sin())
        self.residuals = torch.linalg.lstsq(tall, tall.cumsum(0).sin())[1].tolist()


def test_lazily_conjugated_tensors_that_are_read() -> None:
    ordinary, ours = Conjugated(), wl.defer(Conjugated).materialize()
    assert ours.value == ordinary.value and ours.residuals == ordinary.residuals
    assert torch.equal(ours.inverse, ordinary.inverse)


STRIDED: dict[str, Callable[[], Any]] = {
    "svd": lambda: torch.linalg.svd(torch.ones(3, 2).triu(), full_matrices=False),
    "whole svd of a batch": lambda: torch.linalg.svd(torch.ones(2, 4, 3).triu()),
    "svd_lowrank": lambda: torch.svd_lowrank(torch.eye(3)[:, :2] + 0, q=2)[1:],
    "eig": lambda: torch.linalg.eig(torch.ones(5, 5).triu()),
    "rfftn": lambda: torch.fft.rfftn(torch.ones(4, 6, 5).cumsum(0)),
    "rfft": lambda: torch.fft.rfft(torch.ones(4, 6).cumsum(0), dim=0),
    "irfftn": lambda: torch.fft.irfftn(torch.ones(4, 6, 5, dtype=torch.complex64), dim=(1, 0, 2)),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides_are_those_of_the_processor(name: str) -> None:
    ordinary, ours = Made(STRIDED[name]), wl.defer(lambda: Made(STRIDED[name])).materialize()
    for key, value in ours.state_dict().items():
        theirs = ordinary.state_dict()[key]
        assert value.stride() == theirs.stride() and value.shape == theirs.shape and value.dtype == theirs.dtype


def test_a_deep_copy_of_a_module_forces_nothing() -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(500, 500), nn.BatchNorm1d(500))
        return nn.ModuleList([net, copy.deepcopy(net)])

    deferred = wl.defer(build)
    assert not deferred.forced
    first, second = deferred.materialize()
    assert torch.equal(first[0].weight, second[0].weight) and first[0].weight is not second[0].weight


def test_a_tensor_as_a_tensor_forces_nothing() -> None:
    def build() -> nn.Module:
        net = nn.Linear(500, 500)
        nn.init.constant_(torch.as_tensor(net.weight), 1.0)
        nn.init.constant_(torch.asarray(net.bias.detach()), 2.0)
        net.register_buffer("halves", torch.as_tensor(net.weight.detach(), dtype=torch.float16))
        net.shared = net.weight.is_shared()
        return net

    deferred = wl.defer(build)
    assert not deferred.forced
    ours = deferred.materialize()
    assert bool((ours.weight == 1).all() and (ours.bias == 2).all() and (ours.halves == 1).all())
    assert ours.halves.dtype == torch.float16 and not ours.shared
