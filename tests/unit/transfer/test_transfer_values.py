"""Every dtype, cast, stride and worker count gives the bits it must."""

import pytest
import torch
from transfer_helpers import CPU, DTYPES, Saved, bits, load, random_bits, same

from weightlift import strides
from weightlift.checkpoint.entry import TensorEntry
from weightlift.checkpoint.memory import entry_of
from weightlift.transfer.jobs import Job


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_every_dtype_keeps_every_bit(tmp_path, copy, workers):
    tensors = {str(d): random_bits((37, 11), d, i) for i, d in enumerate(DTYPES.values())}
    tensors |= {f"big.{d}": random_bits((1301, 1000), d, i) for i, d in enumerate(list(DTYPES.values())[::4])}
    saved = Saved(tmp_path / "a.safetensors", tensors)
    for key, value in saved.load(copy=copy, workers=workers).items():
        assert same(value, tensors[key]), key


def test_into_every_dtype(tmp_path):
    tensors = {str(d): random_bits((37, 11), d, i) for i, d in enumerate(DTYPES.values())}
    saved = Saved(tmp_path / "a.safetensors", tensors)
    into = {k: torch.empty(11, 37, dtype=t.dtype).t() for k, t in tensors.items()}
    values = saved.load(saved.jobs(into=into))
    for key, tensor in tensors.items():
        assert values[key] is into[key]
        assert same(into[key], tensor), key


FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("target", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("workers", [1, 8])
def test_casts_equal_to(tmp_path, target, workers):
    sources = [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool]
    tensors = {f"{d}.{n}": (torch.randn(n) * 100).to(d) for d in sources for n in (1, 33, 70_001, 400_003)}
    saved = Saved(tmp_path / "a.safetensors", tensors)
    for key, value in saved.load(saved.jobs(target), workers=workers).items():
        want = tensors[key].to(target)
        assert value.dtype == target
        assert torch.equal(value.isnan(), want.isnan()) if target.itemsize > 1 else True
        assert torch.equal(bits(value), bits(want)), key


def test_complex_casts(tmp_path):
    tensors = {"c": torch.randn(50_001, dtype=torch.complex64), "f": torch.randn(777)}
    saved = Saved(tmp_path / "a.safetensors", tensors)
    values = saved.load(saved.jobs(torch.complex128))
    assert same(values["c"], tensors["c"].to(torch.complex128))
    assert same(values["f"], tensors["f"].to(torch.complex128))


@pytest.mark.parametrize("budget", [0, 200_000, None])
@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_workers_and_budget_change_nothing(saved, workers, budget, dtype):
    values = saved.load(saved.jobs(dtype), copy=True, workers=workers, memory_budget_bytes=budget)
    for key, tensor in saved.tensors.items():
        assert same(values[key], tensor.to(dtype or tensor.dtype)), key


@pytest.mark.parametrize("make", [
    lambda: torch.empty(1201, 1500).t(),
    lambda: torch.empty(1500, 2402)[:, ::2],
    lambda: torch.empty(1501, 1202)[1:, 1:],
    lambda: torch.empty(1500, 1201, dtype=torch.float64),
    lambda: torch.nn.Parameter(torch.empty(1500, 1201)),
    lambda: torch.empty(1201, 1500, dtype=torch.bfloat16).t(),
])  # fmt: skip
@pytest.mark.parametrize("workers", [1, 4])
def test_into_views(saved, make, workers):
    into = make()
    around = into.detach().untyped_storage()
    torch.empty(0, dtype=torch.uint8).set_(around).fill_(7)
    before = torch.empty(0, dtype=torch.uint8).set_(around).clone()
    job = Job("w", saved.entries["large.a"], into.dtype, CPU, into)
    (value,) = load([job], files=[saved.shard], workers=workers)
    assert value is into
    assert same(into, saved.tensors["large.a"].to(into.dtype))
    # Nothing around the view was written.
    with torch.no_grad():
        into.copy_(torch.empty(0, dtype=into.dtype).set_(
            before.untyped_storage(), into.storage_offset(), into.size(), into.stride()))  # fmt: skip
    assert torch.equal(torch.empty(0, dtype=torch.uint8).set_(around), before)


STRIDED = {
    "transposed": ((1201, 1500), (1, 1201), 0), "channels": ((5, 7, 40, 30), (8400, 1, 210, 7), 12),
    "every other": ((700, 600), (2402, 2), 1), "expanded": ((1000, 50), (1, 0), 5), "window": ((500, 8), (1, 1), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("budget", [None, 200_000])
def test_strided_sources(saved, name, dtype, copy, budget):
    shape, stride, offset = STRIDED[name]
    base = saved.entries["large.a"]
    want = saved.tensors["large.a"].as_strided(shape, stride, offset)
    start = base.start + offset * 4
    end = start + strides.span_elements(shape, stride) * 4
    entry = TensorEntry("v", shape, torch.float32, base.file, start, end, stride)
    for into in (None, torch.empty(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))):
        job = Job("v", entry, dtype, CPU, into)
        (value,) = load([job], files=[saved.shard], copy=copy, memory_budget_bytes=budget, workers=3)
        assert same(value, want.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_misaligned_data_is_copied(saved, dtype):
    base = saved.entries["large.a"]
    for shift in (1, 2, 3):
        n = 500_000
        entry = TensorEntry("m", (n,), torch.float32, base.file, base.start + shift, base.start + shift + 4 * n)
        want = bits(saved.tensors["large.a"])[shift : shift + 4 * n].clone().view(torch.float32)
        (value,) = load([Job("m", entry, dtype, CPU)], files=[saved.shard])
        if dtype == torch.float32:
            assert same(value, want)
        else:
            assert torch.equal(value.nan_to_num(), want.to(dtype).nan_to_num())
        assert value.data_ptr() % dtype.itemsize == 0


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_tensors_in_memory(copy, workers):
    given = {
        "a": torch.randn(300, 5000), "t": torch.randn(40, 50).t(), "c": torch.randn(9, dtype=torch.complex64).conj(),
        "n": torch.nn.Parameter(torch.randn(8)), "e": torch.randn(6, 1).expand(6, 9), "z": torch.empty(0, 2),
        "s": torch.tensor(1.0),
    }  # fmt: skip
    for dtype in (None, torch.bfloat16):
        jobs = []
        for key, tensor in given.items():
            entry = entry_of(key, tensor)
            wanted = dtype if dtype and not tensor.is_complex() else tensor.dtype
            jobs.append(Job(key, entry, wanted, CPU))
        for job, value in zip(jobs, load(jobs, tensors=given, copy=copy, workers=workers), strict=True):
            tensor = given[job.fqn].detach()
            assert same(value.resolve_conj(), tensor.resolve_conj().to(job.dtype)), job.fqn
            shared = not copy and dtype is None
            if tensor.numel() and (shared or job.dtype == tensor.dtype):
                assert (value.data_ptr() == tensor.data_ptr()) is shared or tensor.is_complex(), job.fqn


def test_one_tensor_in_memory_is_shared_once():
    tensor = torch.randn(10)
    entry = TensorEntry("a", (10,), torch.float32, None, 0, 40)
    first, second = load(
        [Job("x", entry, torch.float32, CPU), Job("y", entry, torch.float32, CPU)], tensors={"a": tensor}
    )
    assert first.data_ptr() == tensor.data_ptr() != second.data_ptr()
    assert torch.equal(second, tensor)


def test_nothing_to_do():
    assert load([]) == []


def test_big_destinations_are_whole(tmp_path):
    tensors = {"a": torch.randint(-100, 100, (9_000_001,), dtype=torch.int8), "b": torch.randn(5000, 1001)}
    saved = Saved(tmp_path / "a.safetensors", tensors)
    values = saved.load(copy=True, workers=8)
    assert all(same(values[k], t) for k, t in tensors.items())
    values["a"].add_(1)
    assert values["a"].is_contiguous() and values["a"].is_leaf and not values["a"].is_inference()
