import os
import threading

import pytest
import torch
from transfer_helpers import Saved


@pytest.fixture
def saved(tmp_path):
    """A file with small and large tensors, odd sizes, a scalar and a zero-size one."""
    torch.manual_seed(0)
    tensors = {f"small.{i:03}": torch.randn(7 + i, 3) for i in range(200)}
    tensors |= {
        "large.a": torch.randn(1500, 1201), "large.b": torch.randn(3_000_001).bfloat16(),
        "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "ints": torch.arange(1000),
    }  # fmt: skip
    return Saved(tmp_path / "model.safetensors", tensors)


@pytest.fixture(autouse=True)
def nothing_leaks():
    """After every test as many threads and descriptors as before."""
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    if before:
        assert len(os.listdir("/proc/self/fd")) <= len(before)
