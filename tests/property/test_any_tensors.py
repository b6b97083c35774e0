"""Checkpoints whose tensors lie in any way: views with any strides, of memory that others show too, in any dtype and
container, and modules whose tensors do.

Loading has to give what ``load_state_dict`` gives with copies of the same tensors.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.property.search import SEARCH
from torch import nn

import weightlift as wl

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
DTYPES = [*FLOATS, torch.complex64, torch.int64, torch.uint8, torch.bool]
SIZES = [0, 1, 12, 60, 5040]
VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t[1:] if t.dim() else t,
    lambda t: t[:-1] if t.dim() else t,
    lambda t: t[::2] if t.dim() else t,
    lambda t: t[..., 1:] if t.dim() else t,
    lambda t: t[0] if t.dim() and t.shape[0] else t,
    lambda t: t.mT if t.dim() > 1 else t,
    lambda t: t.view(2, -1) if t.is_contiguous() and t.numel() and t.numel() % 2 == 0 else t,
    lambda t: t.view(-1) if t.is_contiguous() else t,
    lambda t: t.unsqueeze(0),
    lambda t: t.expand(2, *t.shape) if t.dim() < 3 else t,
    lambda t: t.diagonal() if t.dim() > 1 else t,
    lambda t: t.conj() if t.is_complex() else t,
    lambda t: torch._neg_view(t) if t.dtype in (torch.float32, torch.complex64) else t,
    lambda t: t.imag if t.is_complex() else t,
    lambda t: t.view(torch.uint8) if t.dim() and t.stride(-1) == 1 and not t.is_complex() and not t.is_neg() else t,
]

number = st.integers(0, 40)
base = st.tuples(st.sampled_from(DTYPES), st.sampled_from(SIZES), st.integers(0, 3))
view = st.tuples(number, st.lists(st.integers(0, len(VIEWS) - 1), max_size=4))


def made(bases: list[tuple[torch.dtype, int, int]], views: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
    """Views of some memory each, of which others may be views too."""
    generator = torch.Generator().manual_seed(len(bases))
    pool = []
    for dtype, size, kind in bases:
        values = torch.randn(size, generator=generator) * 10
        values = values.abs() if dtype == torch.uint8 else values > 0 if dtype == torch.bool else values
        values = values.to(dtype)
        pool.append(values.view(3, -1) if kind == 1 and size % 3 == 0 else values.t() if kind == 2 else values)
    found = []
    for place, steps in views:
        tensor = pool[place % len(pool)]
        for step in steps:
            tensor = VIEWS[step](tensor)
        found.append(tensor)
    return found


class Slots(nn.Module):
    """Parameters and buffers of given shapes and dtypes."""

    def __init__(self, tensors: list[torch.Tensor], kinds: list[int], dtypes: list[torch.dtype | None]):
        super().__init__()
        for at, tensor in enumerate(tensors):
            dtype = dtypes[at % len(dtypes)]
            alike = tensor.is_floating_point() and dtype is not None
            value = torch.zeros(tensor.shape, dtype=dtype if alike else tensor.dtype)
            if kinds[at % len(kinds)] == 0:
                self.register_buffer(f"s{at}", value)
            else:
                self.register_parameter(f"s{at}", nn.Parameter(value, requires_grad=value.is_floating_point()))


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def saved(state: dict[str, torch.Tensor], folder: Path, how: int) -> object:
    """The state in one of the containers there are."""
    path = folder / "a.pt"
    dtypes: dict[int, set[torch.dtype]] = {}
    for tensor in state.values():
        dtypes.setdefault(tensor.untyped_storage().data_ptr(), set()).add(tensor.dtype)
    if how == 0 or (how < 4 and any(len(found) > 1 for found in dtypes.values())):  # which torch does not save
        return state
    if how < 4:  # what is shown conjugated or negated is refused in them
        state = {name: tensor.resolve_conj().resolve_neg() for name, tensor in state.items()}
    if how == 1:
        torch.save(state, path)
    elif how == 2:
        torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=False)
    elif how == 3:
        torch.save({name: nn.Parameter(value, requires_grad=False) for name, value in state.items()}, path)
    else:
        shared = len(dtypes) < len(state)  # names of one value are saved once
        wl.save(copies(state) if shared else state, folder / "saved", max_shard_bytes=9000)
        return folder / "saved"
    return path


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and raw(one) == raw(other)


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


@SEARCH
@given(
    st.lists(base, min_size=1, max_size=4),
    st.lists(view, min_size=1, max_size=6),
    st.lists(st.integers(0, 1), min_size=1, max_size=3),
    st.lists(st.sampled_from([None, *FLOATS]), min_size=1, max_size=3),
    st.integers(0, 4),
    st.sampled_from([None, "auto", torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([None, 4096, 1 << 20]),
    st.booleans(),
    st.booleans(),
)
def test_a_load_gives_what_torch_gives(bases, views, kinds, dtypes, how, dtype, budget, copy, is_existing):
    tensors = made(bases, views)
    state = {f"s{at}": tensor for at, tensor in enumerate(tensors)}
    values = copies(state)
    wanted = Slots(tensors, kinds, dtypes)
    wanted.load_state_dict(values)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = saved(state, Path(folder), how)
        module = Slots(tensors, kinds, dtypes)
        loaded = wl.load(
            module if is_existing else lambda: Slots(tensors, kinds, dtypes),
            source,
            dtype=dtype,
            copy=copy,
            memory_budget_bytes=budget,
        )
        for name, tensor in loaded.state_dict().items():
            expected = wanted.state_dict()[name]
            if tensor.is_floating_point() and dtype is not None:
                expected = values[name].to(values[name].dtype if dtype == "auto" else dtype)
            assert same(tensor, expected), name
        for name, tensor in state.items():
            assert same(tensor, values[name]), "the source was written to"


class Viewing(nn.Module):
    """Parameters and buffers that are views of some memory each."""

    def __init__(self, bases, views, kinds):
        super().__init__()
        for at, tensor in enumerate(made(bases, views)):
            if kinds[at % len(kinds)] == 0:
                self.register_buffer(f"s{at}", tensor)
            else:
                self.register_parameter(f"s{at}", nn.Parameter(tensor, requires_grad=False))


def elements(tensor: torch.Tensor) -> list[int]:
    """The addresses of the elements."""
    places = torch.arange(tensor.numel() and 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())))
    return (places.as_strided(tensor.shape, tensor.stride()) * tensor.itemsize + tensor.data_ptr()).reshape(-1).tolist()


def one_way(tensors: list[torch.Tensor]) -> bool:
    """Whether every element has one name and is there once, or is the same element of names that are one view.

    Views in different dtypes of one memory are not told apart, so that they are refused."""
    seen: dict[int, tuple[object, ...]] = {}
    dtypes: dict[int, torch.dtype] = {}
    for tensor in tensors:
        if dtypes.setdefault(tensor.untyped_storage().data_ptr(), tensor.dtype) != tensor.dtype:
            return False
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        places = elements(tensor)
        if len(set(places)) < len(places):
            return False
        for place in places:
            for byte in range(place, place + tensor.itemsize):
                if seen.setdefault(byte, view) != view:
                    return False
    return True


@SEARCH
@given(
    st.lists(base.filter(lambda one: one[1] < 100), min_size=1, max_size=3),
    st.lists(view, min_size=1, max_size=6),
    st.lists(st.integers(0, 1), min_size=1, max_size=3),
    st.lists(view, min_size=6, max_size=6),
    st.sampled_from([1, 8]),
    st.booleans(),
)
def test_a_module_takes_views_of_its_own_memory(bases, views, kinds, sources, workers, strict):
    module, wanted = Viewing(bases, views, kinds), Viewing(bases, views, kinds)
    slots = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    assume(one_way(list(slots.values())))
    own = list(slots.values())
    state = {}
    for at, (name, tensor) in enumerate(slots.items()):
        place, steps = sources[at]
        source = own[place % len(own)]
        for step in steps:
            source = VIEWS[step](source)
        if source.shape == tensor.shape and source.is_complex() == tensor.is_complex():
            state[name] = source
        elif strict:
            state[name] = torch.ones_like(tensor)
    values = copies(state)
    names: dict[tuple[object, ...], bytes] = {}
    for name in state:  # tied names that disagree are refused
        tied = (slots[name].data_ptr(), slots[name].shape, slots[name].stride())
        value = raw(values[name]) + str(values[name].dtype).encode()
        assume(not slots[name].numel() or names.setdefault(tied, value) == value)
    wanted.load_state_dict(values, strict=strict)
    wl.load(module, state, strict=strict, workers=workers)
    for name, tensor in module.state_dict().items():
        assert same(tensor, wanted.state_dict()[name]), name
