"""Constructors that read values: through ATen, through Python numbers, numpy, dlpack, printing and pickling."""

from __future__ import annotations

import copy
import ctypes
import io
import math
import pickle
from typing import Any

import numpy as np
import torch
from torch import nn

from .cases import Bag, add, case, equal, holds, near


def read(name: str, fn: Any, **options: Any) -> None:
    """`fn` gets a tensor of 3.0 that was filled in place, and what it returns is kept as a plain attribute."""

    def build() -> nn.Module:
        t = torch.empty(64)
        t.fill_(3.0)
        got = fn(t)
        bag = Bag(t=nn.Parameter(t))
        bag.got = got
        return bag

    add(f"filled_{name}", build, __name__, kind="exact", **options)


read("item", lambda t: (t[0].item(), float(t[1]), int(t[2]), bool(t[3]), complex(t[4])))
read("tolist", lambda t: t.tolist())
read("iteration", lambda t: [x * 2 for x in t][:3])
read("contains", lambda t: (3.0 in t, 4.0 in t))
read("as_index", lambda t: list(range(10))[t[0].int()])
read("format", lambda t: f"{t[0]:.3f} {t.mean():.1f}")
read("repr", lambda t: repr(t) + str(t[:2]))
read("numpy", lambda t: t.numpy())
read("numpy_of_data", lambda t: t.data.detach().numpy().sum().item())
read("numpy_force", lambda t: t.numpy(force=True).copy())
read("np_asarray", lambda t: np.asarray(t))
read("np_array", lambda t: np.array(t))
read("np_function", lambda t: np.sqrt(t))
read("np_from_dlpack", lambda t: np.from_dlpack(t))
read("dlpack_protocol", lambda t: torch.from_dlpack(t).sum().item())
read("memoryview", lambda t: bytes(memoryview(t.numpy())[:2].cast("B")))
read("data_ptr_ctypes", lambda t: list((ctypes.c_float * 4).from_address(t.data_ptr())))
read("storage_tolist", lambda t: t.untyped_storage().tolist()[:8])
read("typed_storage", lambda t: t.storage()[5])
read("storage_clone", lambda t: torch.tensor(0.0).set_(t.untyped_storage().clone(), 0, (4,)).clone())
read("storage_data_ptr", lambda t: (ctypes.c_float * 4).from_address(t.untyped_storage().data_ptr())[1])
read("pickle", lambda t: pickle.loads(pickle.dumps(t)))
read("torch_tensor_of_list", lambda t: torch.tensor([t[0], t[1] * 2, 5.0]))
read("torch_tensor_of_tensor", lambda t: torch.tensor(t))
read("as_tensor_asarray", lambda t: (torch.as_tensor(t.numpy()), torch.asarray(t).sum().item()))
read("legacy_constructor", lambda t: torch.Tensor([t[0].item(), 1]), tolerance=0)
read("new_tensor", lambda t: t.new_tensor([1.0, 2.0]) + t[:2])
read("math", lambda t: math.sqrt(t[0]))
read("round_trip_bytes", lambda t: t.numpy().tobytes())
read(
    "equal",
    lambda t: (torch.equal(t, torch.full((64,), 3.0)), torch.allclose(t, torch.ones(64) * 3), (t == 3).all().item()),
)
read(
    "nonzero_unique", lambda t: (t.nonzero().shape[0], t.unique().tolist(), t[t > 2].numel(), t.count_nonzero().item())
)
read("bincount_histogram", lambda t: (torch.bincount(t.long()), torch.histc(t, 4)))
read("masked_select", lambda t: t.masked_select(t > 1).shape[0])
read("repeat_by_values", lambda t: torch.repeat_interleave(torch.arange(64), t.long()).shape[0])
read("linspace_between", lambda t: torch.linspace(0, t[0].item(), 5).tolist())
read("copy_copy", lambda t: copy.copy(t) + 1)
read("deepcopy_storage", lambda t: copy.deepcopy(t.untyped_storage()).tolist()[:4])
read("share_memory", lambda t: t.clone().share_memory_().sum().item())
read("cpu_and_to", lambda t: (t.cpu().sum().item(), t.to("cpu", copy=True).numpy()))
read("apply_map", lambda t: (t.clone().apply_(lambda x: x + 1), t.clone().map_(t, lambda a, b: a * b)))
read("hash_and_len", lambda t: (len(t), t.numel(), len({t}), t.is_nonzero() if t.numel() == 1 else None))
read("isfinite_assert", lambda t: torch.isfinite(t).all().item() and torch._assert(t.sum() > 0, "sum"))
read("jit_script", lambda t: torch.jit.script(lambda_free)(t).sum().item())


def lambda_free(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@case(check=lambda m: near(m.w.norm(), m.norm, "the norm read in the constructor"))
def norm_of_a_sample_kept_as_a_number() -> nn.Module:
    lin = nn.Linear(64, 64)
    bag = Bag(w=lin.weight)
    bag.norm = lin.weight.norm().item()
    return bag


def _as_read(m: Any) -> None:
    equal(m.w[0], torch.tensor(m.first_row), "the row that was read")
    equal(m.w, torch.from_numpy(m.array), "the array that was read")


@case(check=_as_read, repeatable=True, missing=True)
def sampled_then_read_through_numpy_and_lists() -> nn.Module:
    bag = Bag(w=nn.Parameter(torch.randn(64, 64)))
    bag.first_row = bag.w[0].tolist()
    bag.array = bag.w.detach().numpy().copy()
    return bag


@case(kind="exact")
def drop_path_schedule() -> nn.Module:
    rates = [x.item() for x in torch.linspace(0, 0.3, 6)]
    bag = Bag(layers=nn.ModuleList([Bag(drop=nn.Dropout(r), w=nn.Parameter(torch.full((4,), r))) for r in rates]))
    bag.rates, bag.more = rates, torch.arange(0, 1, 0.25).tolist()
    return bag


@case(kind="exact")
def rotary_tables() -> nn.Module:
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, 32, 2, dtype=torch.int64).float() / 32))
    bag = Bag()
    bag.register_buffer("inv_freq", inv_freq, persistent=False)
    bag.original = bag.inv_freq
    angles = torch.outer(torch.arange(64, dtype=inv_freq.dtype), inv_freq)
    table = torch.cat((angles, angles), dim=-1)
    bag.register_buffer("cos", table.cos()[None, None], persistent=False)
    bag.register_buffer("sin", table.sin()[None, None], persistent=False)
    bag.register_buffer("kept", torch.polar(torch.ones_like(angles), angles))
    return bag


@case(kind="exact")
def llama3_scaled_rotary() -> nn.Module:
    inv_freq = 1.0 / (500000.0 ** (torch.arange(0, 64, 2).float() / 64))
    scaled = []
    for freq in inv_freq:
        wave = 2 * math.pi / freq
        scaled.append(freq if wave < 2048 else freq / 8)
    bag = Bag()
    bag.register_buffer("inv_freq", torch.tensor(scaled, dtype=inv_freq.dtype), persistent=False)
    return bag


@case(kind="exact")
def numpy_view_written_after() -> nn.Module:
    t = torch.zeros(8, 8)
    view = t.numpy()
    view[0] = 5.0
    np.fill_diagonal(view, 2.0)
    return Bag(w=nn.Parameter(t))


@case()
def numpy_view_of_a_sample_written_after() -> nn.Module:
    t = torch.empty(64, 64).normal_()
    t.numpy()[:8] = 1.0
    t[8].fill_(2.0)
    t.mul_(3.0)
    t.numpy()[9] += 100.0
    return Bag(w=nn.Parameter(t))


@case(kind="exact")
def from_numpy_then_the_array_changes() -> nn.Module:
    array = np.arange(64, dtype=np.float32)
    copied = nn.Parameter(torch.empty(64))
    with torch.no_grad():
        copied.copy_(torch.from_numpy(array))
    cloned = torch.from_numpy(array).clone()
    scaled = torch.from_numpy(array) * 2
    built = torch.tensor(array)
    array[:] = -1.0
    return Bag(copied=copied, cloned=cloned, scaled=scaled, built=built)


@case(kind="exact")
def parameter_in_the_memory_of_a_kept_array() -> nn.Module:
    """What is loaded into the one is seen in the other."""
    array = np.arange(64, dtype=np.float32)
    bag = Bag(shared=nn.Parameter(torch.from_numpy(array)))
    array[:] = -1.0
    bag.array = array
    return bag


@case(kind="exact")
def frombuffer_then_the_bytes_change() -> nn.Module:
    raw = bytearray(np.ones(16, dtype=np.float32).tobytes())
    copied = torch.empty(16).copy_(torch.frombuffer(raw, dtype=torch.float32))
    raw[:] = bytes(64)
    return Bag(w=nn.Parameter(copied))


@case(kind="exact")
def copied_from_a_list_of_tensors_that_change() -> nn.Module:
    rows = [torch.full((32,), float(i)) for i in range(8)]
    stacked = nn.Parameter(torch.stack(rows))
    filled = nn.Parameter(torch.zeros(8, 32))
    with torch.no_grad():
        for target, row in zip(filled, rows, strict=True):
            target.copy_(row)
    for row in rows:
        row.zero_()
    return Bag(stacked=stacked, filled=filled)


@case(kind="exact")
def numpy_scalars_and_arrays_as_sources() -> nn.Module:
    w = nn.Parameter(torch.empty(4, 4))
    with torch.no_grad():
        w.fill_(np.float32(0.5))
        w[0] = torch.from_numpy(np.arange(4)).float()
        w[1] = torch.as_tensor([1.0, 2.0, 3.0, 4.0])
    return Bag(w=w, b=torch.tensor(np.float64(3.0)), c=torch.from_numpy(np.eye(4)) @ torch.ones(4, dtype=torch.double))


@case(check=lambda m: equal(m.saved["w"], m.lin.weight, "what torch.save wrote"))
def torch_save_inside() -> nn.Module:
    lin = nn.Linear(64, 64)
    file = io.BytesIO()
    torch.save({"w": lin.weight.detach(), "sd": lin.state_dict()}, file)
    file.seek(0)
    bag = Bag(lin=lin)
    bag.saved = {"w": torch.load(file, weights_only=True)["w"]}
    return bag


@case(check=lambda m: equal(m.copied.weight, m.lin.weight, "the pickled layer"))
def pickled_layer() -> nn.Module:
    lin = nn.Linear(64, 64)
    return Bag(lin=lin, copied=pickle.loads(pickle.dumps(lin)))


@case(check=lambda m: holds("tensor(0.01" in m.text or "tensor(0.02" in m.text, f"printed as {m.text}"))
def printing_samples() -> nn.Module:
    bag = Bag(w=nn.Parameter(torch.rand(64, 64) * 0.009 + 0.0105), lin=nn.Linear(64, 64))
    bag.text = str(bag.w[0, 0]) + repr(bag.lin)
    print(bag.w, bag.lin.weight, bag.state_dict())
    return bag


@case()
def hash_of_a_sample_decides_nothing_else() -> nn.Module:
    """A checksum is read; what is built afterwards is as ever."""
    a = nn.Linear(64, 64)
    assert float(a.weight.double().sum()) != 0.0
    return Bag(a=a, b=nn.Linear(64, 64), c=nn.Parameter(torch.rand(64, 64)))
