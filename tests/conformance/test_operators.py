"""Operators and layers that are called within a constructor give and leave what they do anywhere else."""

from __future__ import annotations

import pytest
import torch

from .operators import DTYPES, differences


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_operator_and_layer() -> None:
    count, found = differences(torch.float32, samples=1)
    assert not found, "\n".join(found)
    assert count > 800


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_some_of_other_dtypes_whose_values_are_read(dtype: torch.dtype) -> None:
    count, found = differences(dtype, samples=1, every=1 if dtype.is_complex else 6, read=True)
    assert not found, "\n".join(found)
    assert count > 50


@pytest.mark.full
@pytest.mark.parametrize("read", [False, True], ids=["kept", "read"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all(dtype: torch.dtype, grad: bool, read: bool) -> None:
    _, found = differences(dtype, samples=4, grad=grad, read=read)
    assert not found, "\n".join(found)
