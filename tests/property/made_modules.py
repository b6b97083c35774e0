"""Modules made up at random with code of their own for state dicts, and checkpoints of them."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.property.made_state_code import (
    ACTIONS,
    DTYPES,
    SHAPES,
    WORDS,
    Base,
    Call,
    after,
    filled,
    override,
    own_loading,
    set_extra,
    unhook,
)
from torch import nn
from torch.nn.utils import parametrizations

LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(4, 3),
    lambda: nn.BatchNorm1d(4),
    lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    lambda: nn.LazyLinear(3),
    lambda: nn.LazyBatchNorm1d(),
    lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    lambda: nn.MultiheadAttention(4, 2),
    lambda: nn.GRU(4, 4),
    lambda: nn.ParameterList([torch.ones(4), torch.ones(2, 2)]),
    lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
]
number = st.integers(0, 30)
slots = st.lists(st.tuples(st.integers(0, 11), number, number), max_size=4)
code = st.lists(st.tuples(st.integers(0, 5), number, number, st.integers(0, len(ACTIONS) - 1)), max_size=4)


def specs(children):
    """Slots, code, children, version, ways."""
    return st.tuples(st.just("made"), slots, code, st.lists(children, max_size=3), st.integers(1, 3), number)


leaves = st.one_of(
    st.tuples(st.just("layer"), number), st.tuples(st.just("again"), number), st.tuples(st.just("none"))
)
programs = specs(st.one_of(leaves, specs(st.one_of(leaves, specs(leaves)))))

class Builder:
    """Builds a tree; knows what it has made, for ties and modules that are used again."""

    def __init__(self):
        self.tensors: list[torch.Tensor] = []
        self.modules: list[nn.Module] = []

    def build(self, spec):
        if spec[0] == "none":
            return None
        if spec[0] == "again":
            return self.modules[spec[1] % len(self.modules)] if self.modules else None
        made = filled(LAYERS[spec[1] % len(LAYERS)](), len(self.modules)) if spec[0] == "layer" else self.made(spec)
        self.modules.append(made)
        return made

    def made(self, spec):
        _, slots, code, children, version, ways = spec
        namespace = {"_version": version, "code": code}
        if any(place < 2 for place, *_ in code):
            namespace["_load_from_state_dict"] = own_loading if ways % 5 == 0 else override
        if ways % 3 == 0:
            namespace["set_extra_state"] = set_extra
            namespace["get_extra_state"] = lambda self: [torch.ones(2), {"n": 1}, 5][ways % 7 % 3]
        module = type("Made", (Base,), namespace)()
        module.notes, module.told = [], []
        for at, (what, n, k) in enumerate(slots):
            self.slot(module, WORDS[at % 3] if at < 3 else "d", what, n, k)
        for at, child in enumerate(children):
            made = self.build(child)
            module.register_module(f"m{at}", made)
        self.hooks(module, code, ways)
        return module

    def slot(self, module, name, what, n, k):
        value = torch.empty(SHAPES[n % len(SHAPES)])
        value.copy_(torch.arange(value.numel()).view(value.shape) + len(self.tensors))
        before = self.tensors[k % len(self.tensors)] if self.tensors else value
        if what in (0, 1, 2, 3):
            module.register_parameter(name, nn.Parameter(value, requires_grad=what != 3))
        elif what in (4, 5):
            module.register_buffer(name, value.to(DTYPES[k % len(DTYPES)]), persistent=what == 4)
        elif what == 6:
            module.register_parameter(name, nn.Parameter(value.to(DTYPES[k % 3])))
        elif what == 7:
            module.register_parameter(name, None) if k % 2 else module.register_buffer(name, None)
        elif what == 8 and isinstance(before, nn.Parameter):
            module.register_parameter(name, before)
        elif what == 9:
            module.register_buffer(name, before)
        elif what == 10:
            view = before.detach()
            view = [view, view.t() if view.dim() == 2 else view, view[1:] if view.dim() else view][k % 3]
            module.register_buffer(name, view)
        else:
            module.register_parameter(name, nn.Parameter(before.detach(), requires_grad=before.is_floating_point()))
        found = getattr(module, name)
        if found is not None:
            self.tensors.append(found)

    def hooks(self, module, code, ways):
        for place, n, k, action in code:
            act = ACTIONS[action]

            def plain(state, prefix, metadata, strict, *lists, act=act, n=n, k=k, module=module):
                act(Call(module, state, prefix, metadata, *lists, n, k))

            def given(module, state, prefix, metadata, strict, *lists, act=act, n=n, k=k):
                act(Call(module, state, prefix, metadata, *lists, n, k))

            if act is unhook:  # torch goes through the hooks themselves: none can be taken off meanwhile
                continue
            if place == 2:
                module.register_load_state_dict_pre_hook(given)
            elif place == 3:
                module._register_load_state_dict_pre_hook(plain)
            elif place == 4:
                module._register_load_state_dict_pre_hook(given, with_module=True)
            elif place == 5:
                module.register_load_state_dict_post_hook(functools.partial(after, n=n, k=k))


def build(program):
    return Builder().build(program)


# -- checkpoints ------------------------------------------------------------------------------------------------------

edit = st.one_of(
    st.tuples(st.sampled_from(["drop", "wrap", "cast", "shape", "kind", "rename"]), number, number),
    st.tuples(st.just("add"), number, number),
    st.tuples(st.just("version"), number, number),
)
edits = st.lists(edit, max_size=4)


def state_for(program, changes):
    module = build(program)
    generator = torch.Generator().manual_seed(1)
    state = module.state_dict()
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor) and not torch.nn.parameter.is_lazy(tensor):
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 5)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            lazy = torch.nn.parameter.is_lazy(value)
            shape = (3, 4) if name.endswith("weight") else (3,)
            state[name] = torch.randn(shape, generator=generator) if lazy else value.detach().clone().contiguous()
    prefixes = sorted({name.rpartition(".")[0] for name in state} | {""})
    for what, n, k in changes:
        change(state, what, n, k, prefixes, generator)
    return state


def change(state, what, n, k, prefixes, generator):
    names = sorted(state)
    name = names[n % len(names)] if names else ""
    value = state.get(name)
    prefix = prefixes[n % len(prefixes)]
    fresh = f"{prefix}.{WORDS[k % len(WORDS)]}" if prefix else WORDS[k % len(WORDS)]
    if what == "add":
        state[fresh] = torch.randn(SHAPES[(n + k) % len(SHAPES)], generator=generator)
    elif what == "version":
        metadata = getattr(state, "_metadata", None)
        if k % 2 and metadata is not None:
            del state._metadata
        elif metadata is not None:
            for item in metadata.values():
                item["version"] = 1
    elif what == "wrap" and k % 5 == 0:
        for old in names:
            state["model." + old] = state.pop(old)
    elif not names:
        return
    elif what == "drop":
        del state[name]
    elif what == "rename":
        state[fresh] = state.pop(name)
    elif what == "kind":
        state[name] = 7
    elif not isinstance(value, torch.Tensor):
        return
    elif what == "cast":
        state[name] = value.to(DTYPES[k % len(DTYPES)])
    elif what == "shape":
        shapes = [value.reshape(-1), value[None], value.t() if value.dim() == 2 else value, value.reshape(-1)[:2]]
        state[name] = shapes[k % 4].clone().contiguous()


def cloned(state):
    made = OrderedDict((name, copy.deepcopy(value)) for name, value in state.items())
    if hasattr(state, "_metadata"):
        made._metadata = copy.deepcopy(state._metadata)
    return made


def stored(state, form, folder):
    """The checkpoint as it is given to a load, and how torch gets it."""
    path = Path(folder) / f"a.{form}"
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if form == "mapping" and tensors:
        return (lambda: cloned(state)), (lambda: cloned(state))
    if form == "plain" and tensors:
        return (lambda: dict(cloned(state))), (lambda: dict(cloned(state)))
    if form == "pt" and tensors:
        torch.save(state, path)
        return (lambda: path), (lambda: torch.load(path, weights_only=True))
    path = path.with_suffix(".safetensors")
    save_file(tensors, path)
    return (lambda: path), (lambda: load_file(path))
