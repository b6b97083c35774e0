"""Whatever mode the caller is in, results are plain tensors with the file's values."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transfer_helpers import CPU, load, same

from weightlift.options import LoadOptions
from weightlift.transfer.compare import Pair, same_values
from weightlift.transfer.jobs import Job, Task
from weightlift.transfer.subject import Bytes


class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"dispatch saw {func}")


class RefuseFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"function mode saw {func}")


MODES = {
    "dispatch": Refuse, "function": RefuseFunctions, "fake": FakeTensorMode, "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"), "no_grad": torch.no_grad, "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [1, 4])
def test_ambient_modes_do_not_interfere(saved, mode, workers):
    into = torch.nn.Parameter(torch.zeros(1201, 1500).t())
    entry = saved.entries["large.a"]
    ran = []
    task = Task("t", 1, lambda: ran.append(torch.ones(3)))
    jobs = [*saved.jobs(), *saved.jobs(torch.float64), Job("into", entry, torch.float32, CPU, into)]
    memory = {"m": torch.arange(4.0)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(MODES[mode]())
        values = load(jobs, [task], files=[saved.shard], workers=workers)
        copied = load(saved.jobs(), files=[saved.shard], workers=workers, copy=True)
        both = Pair(entry, saved.entries["large.b"])
        (pair,) = same_values([both], source=Bytes([saved.shard], memory, {}), options=LoadOptions(workers=1))
        inside = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        assert inside == (mode == "inference", mode not in ("inference", "no_grad"))
    assert pair is False
    for value, job in zip(values, jobs, strict=True):
        assert not value.is_inference() and value.device == CPU
        assert same(value, saved.tensors[job.entry.key].to(job.dtype))
    for value, job in zip(copied, saved.jobs(), strict=True):
        assert same(value, saved.tensors[job.entry.key])
    assert type(ran[0]) is torch.Tensor and ran[0].device == CPU


def test_into_an_inference_tensor_and_a_leaf_that_requires_grad(saved):
    entry = saved.entries["large.a"]
    with torch.inference_mode():
        inference = torch.zeros(1201, 1500).t()
    leaf = torch.zeros(1500, 1201, dtype=torch.float64, requires_grad=True)
    load([Job("a", entry, torch.float32, CPU, inference), Job("b", entry, torch.float64, CPU, leaf)],
         files=[saved.shard])  # fmt: skip
    assert same(inference, saved.tensors["large.a"])
    assert same(leaf, saved.tensors["large.a"].double()) and leaf.is_leaf and leaf.grad_fn is None
