"""Modules and checkpoints made up at random: state-dict hooks, overrides, extra state, ties, views, lazy modules.

A load has to do what torch's ``load_state_dict`` does to an ordinarily built copy: the same values in the same memory,
the same missing and unexpected keys, the same attributes, the same refusal. That a tied name provides for another, and
what two names of one memory with different values get, is as docs/plan.md says.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

import weightlift as wl

EXAMPLES = os.environ.get("WEIGHTLIFT_EXAMPLES")
SEARCH = settings(
    max_examples=int(EXAMPLES or 200),
    derandomize=EXAMPLES is None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
WORDS = ["a", "b", "c", "x", "m0.a", "m0.weight", "y"]  # names that slots, hooks and checkpoints meet at
SHAPES = [(4,), (4, 4), (3, 4), (), (1,), (0, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64]

# -- what hooks and overrides do --------------------------------------------------------------------------------------


@dataclass
class Call:
    """What the code of one module is called with."""

    module: nn.Module
    state: Any
    prefix: str
    metadata: Any
    missing: list[str]
    unexpected: list[str]
    errors: list[str]
    n: int
    k: int

    @property
    def key(self):
        return self.prefix + WORDS[self.n % len(WORDS)]

    @property
    def other(self):
        return self.prefix + WORDS[self.k % len(WORDS)]

    @property
    def name(self):
        return WORDS[self.n % 3]

    @property
    def value(self):
        found = self.state.get(self.key)
        return found if isinstance(found, torch.Tensor) else None

    @property
    def own(self):
        found = getattr(self.module, self.name, None)
        return found if isinstance(found, torch.Tensor) and not torch.nn.parameter.is_lazy(found) else None


def changing(function):
    """An action that gives a key another value."""

    def act(call):
        if call.value is not None:
            call.state[call.key] = function(call.value, call)

    return act


def rename(call):
    if call.key in call.state:
        call.state[call.other] = call.state.pop(call.key)


def double(call):
    if call.key in call.state:
        call.state[call.other] = call.state[call.key]


def swap(call):
    if call.key in call.state and call.other in call.state:
        call.state[call.key], call.state[call.other] = call.state[call.other], call.state[call.key]


def split(call):
    if call.value is not None and call.value.dim():
        halves = call.state.pop(call.key).chunk(2)
        call.state[call.other], call.state[call.prefix + "y"] = halves[0], halves[-1]


def merge(call):
    other = call.state.get(call.other)
    if call.value is not None and isinstance(other, torch.Tensor) and call.key != call.other:
        call.state[call.other] = torch.cat([call.value.reshape(-1), other.reshape(-1)])
        del call.state[call.key]


def drop(call):
    call.state.pop(call.key, None)


def fit_value(value, call):
    """Cut, or padded with zeros, to the size of the module's own."""
    if call.own is None or call.own.dim() != value.dim() or not value.dim():
        return value
    made = value.new_zeros(call.own.shape)
    region = tuple(slice(0, min(extents)) for extents in zip(value.shape, call.own.shape))
    made[region] = value[region]
    return made


def fit_module(call):
    value, own = call.value, call.own
    if value is None or own is None or call.key != call.prefix + call.name:
        return
    if call.k % 4 == 0 and isinstance(own, nn.Parameter):
        setattr(call.module, call.name, nn.Parameter(torch.zeros(value.shape), requires_grad=own.requires_grad))
    elif call.k % 4 == 1:
        own.data = torch.zeros(value.shape, dtype=own.dtype)
    elif call.k % 4 == 2 and call.name in call.module._buffers:
        setattr(call.module, call.name, torch.zeros_like(value))
    elif own.is_contiguous() and not own.requires_grad:
        own.resize_(value.shape).zero_()


def adopt(call):
    """The checkpoint's tensor itself becomes the module's."""
    if call.value is None or call.name in call.module._modules:
        return
    value = call.value if call.k % 2 else call.value.clone()
    if call.name in call.module._buffers:
        setattr(call.module, call.name, value)
    elif value.is_floating_point():
        setattr(call.module, call.name, nn.Parameter(value, requires_grad=call.k % 3 != 0))


def add_buffer(call):
    if call.value is not None and not hasattr(call.module, f"new{call.n}"):
        value = [call.value, call.value.clone(), torch.zeros_like(call.value)][call.k % 3]
        call.module.register_buffer(f"new{call.n}", value, persistent=call.k % 2 == 0)
        if call.k % 3 == 2:
            call.state[f"{call.prefix}new{call.n}"] = call.state.pop(call.key)


def add_module(call):
    if "added" not in call.module._modules:
        call.module.added = filled(nn.Linear(4, 3))
        if call.value is not None:
            call.state[f"{call.prefix}added.weight"] = call.state.pop(call.key)


def write_own(call):
    if call.own is None:
        return
    with torch.no_grad():
        if call.value is not None and call.value.shape == call.own.shape and call.k % 2:
            call.own.copy_(call.value)
        else:
            [call.own.zero_, lambda: call.own.mul_(2), lambda: call.own.add_(1)][call.k % 3]()


def write_child(call):
    for child in call.module.children():
        for tensor in [*child.parameters(recurse=False), *child.buffers(recurse=False)]:
            if not torch.nn.parameter.is_lazy(tensor):
                with torch.no_grad():
                    tensor.add_(call.k)


def give_own(call):
    """The state gets the module's own value, where it has none."""
    if call.own is not None and call.prefix + call.name not in call.state:
        given = [call.own, call.own.detach(), call.own.detach().clone(), call.own.detach() * 2]
        call.state[call.prefix + call.name] = given[call.k % 4]


def tie(call):
    own, other = call.own, WORDS[call.k % 3]
    if own is not None and other in call.module._parameters and isinstance(own, nn.Parameter):
        setattr(call.module, other, own)


def forget(call):
    if call.own is not None:
        if call.k % 2:
            setattr(call.module, call.name, None)
        else:
            delattr(call.module, call.name)


def set_grad(call):
    if isinstance(call.own, nn.Parameter):
        call.own.requires_grad_(call.k % 2 == 0)


def report(call):
    if call.k % 5 == 0:
        call.errors.append(f"{call.prefix}: {call.n}")
    elif call.k % 5 == 1:
        call.missing.append(call.key)
    elif call.k % 5 == 2:
        call.unexpected.append(call.key)
    elif call.k % 5 == 3:
        call.missing[:] = [name for name in call.missing if name != call.key]
    else:
        call.unexpected[:] = [name for name in call.unexpected if not name.startswith(call.prefix)]


def note(call):
    seen = sorted((name, kind(value)) for name, value in call.state.items())
    call.module.notes.append((call.prefix, seen, dict(call.metadata), list(call.missing), list(call.unexpected)))


def kind(value):
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, torch.Tensor) else repr(value)


def by_version(call):
    if (call.metadata.get("version") or 0) < 2:
        rename(call)


def by_value(call):
    if call.value is not None and float(call.value.double().sum()) > 1:
        rename(call)


def convert(call):
    if not any(map(torch.nn.parameter.is_lazy, call.module.parameters())):
        with torch.no_grad():
            call.module.double() if call.k % 2 else call.module.bfloat16()


def transient(call):
    if call.name in call.module._buffers:
        names = call.module._non_persistent_buffers_set
        names.discard(call.name) if call.name in names else names.add(call.name)


def value_of_another_kind(call):
    if call.key in call.state:
        call.state[call.key] = call.k


def stray(call):
    """A key of somewhere else."""
    if call.value is not None:
        call.state["stray"] = call.value


def point(call):
    """Other memory for the same object: that of the checkpoint's value, or memory of its own."""
    if call.own is None:
        return
    if call.value is not None and call.value.dtype == call.own.dtype and call.n % 2:
        call.own.data = call.value
    else:
        call.own.data = call.own.detach().clone()


def mark(call):
    """An attribute of a tensor, and a tensor that is an attribute only."""
    if call.own is not None:
        call.own.mark = call.k
    if call.value is not None:
        call.module.held = [call.value, call.value.clone(), call.own][call.k % 3]


def nested(call):
    """A child loads its part by itself, as some libraries do."""
    child = call.module._modules.get(f"m{call.k % 2}")
    start = f"{call.prefix}m{call.k % 2}."
    if child is None or isinstance(child, Base):
        return
    part = {key[len(start) :]: call.state[key] for key in list(call.state) if key.startswith(start)}
    child.load_state_dict(part, strict=False)
    if call.n % 2:
        for key in part:
            del call.state[start + key]


def replace_child(call):
    at = f"m{call.k % 3}"
    if call.n % 3 == 0 and at in call.module._modules:
        setattr(call.module, at, None)
    elif call.n % 3 == 1:
        setattr(call.module, at, filled(nn.Linear(4, 3)))
    elif type(call.module._modules.get(at)) is nn.Linear and not call.module._modules[at]._forward_pre_hooks:
        call.module.again = copy.deepcopy(call.module._modules[at])


def unhook(call):
    hooks = call.module._load_state_dict_pre_hooks
    if len(hooks) > 1:
        del hooks[next(reversed(hooks))]


ACTIONS: list[Callable[[Call], object]] = [
    rename,
    drop,
    double,
    swap,
    split,
    merge,
    by_version,
    by_value,
    note,
    changing(lambda value, call: value.t() if value.dim() == 2 else value),
    changing(lambda value, call: value.to(DTYPES[call.k % len(DTYPES)])),
    changing(lambda value, call: value.reshape(call.own.shape) if fits(value, call.own) else value),
    changing(fit_value),
    changing(lambda value, call: value.mul_(2)),
    changing(lambda value, call: value[1:] if value.dim() else value),
    changing(lambda value, call: nn.Parameter(value) if value.is_floating_point() else value),
    fit_module,
    adopt,
    add_buffer,
    add_module,
    write_own,
    write_child,
    give_own,
    tie,
    forget,
    set_grad,
    report,
    convert,
    transient,
    value_of_another_kind,
    stray,
    point,
    mark,
    nested,
    replace_child,
    unhook,
]


def fits(value, own):
    return own is not None and own.numel() == value.numel()


def after(module, keys, *, n, k):
    """A post hook. They run at the end, so that what they note stands apart."""
    module.told.append((sorted(set(keys.missing_keys)), sorted(set(keys.unexpected_keys))))
    if k % 4 == 0:
        keys.missing_keys.clear()
    elif k % 4 == 1:
        keys.unexpected_keys[:] = [key for key in keys.unexpected_keys if not key.endswith(WORDS[n % len(WORDS)])]
    elif k % 4 == 2:
        module.extra = n


# -- modules ----------------------------------------------------------------------------------------------------------

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


class Base(nn.Module):
    """What a specification describes."""

    code: Any = ()

    def run(self, places, *arguments):
        state, prefix, metadata, strict, *lists = arguments
        assert strict
        for place, n, k, action in self.code:
            if place in places:
                ACTIONS[action](Call(self, state, prefix, metadata, *lists, n, k))


def override(self, *arguments):
    self.run((0,), *arguments)
    nn.Module._load_from_state_dict(self, *arguments)
    self.run((1,), *arguments)


def own_loading(self, state, prefix, metadata, strict, missing, unexpected, errors):
    """An override that does without torch's."""
    self.run((0,), state, prefix, metadata, strict, missing, unexpected, errors)
    for name, tensor in [*self._parameters.items(), *self._buffers.items()]:
        value = state.get(prefix + name)
        if tensor is None or torch.nn.parameter.is_lazy(tensor):
            continue
        if not isinstance(value, torch.Tensor):
            missing.append(prefix + name)
        elif value.shape == tensor.shape:
            with torch.no_grad():
                tensor.copy_(value)
        else:
            errors.append(f"size mismatch for {prefix + name}: other")
    self.run((1,), state, prefix, metadata, strict, missing, unexpected, errors)


def set_extra(self, state):
    self.extra = kind(state)


def filled(module, start=0.5):
    """No samples: the values are those of the constructor whichever way it is run."""
    with torch.no_grad():
        for at, tensor in enumerate([*module.parameters(), *module.buffers()]):
            if not torch.nn.parameter.is_lazy(tensor):
                tensor.copy_(start + at + torch.arange(tensor.numel()).view(tensor.shape) % 7)
    return module


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


# -- comparing --------------------------------------------------------------------------------------------------------


def tensors_of(module):
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def described(tensor):
    lazy = torch.nn.parameter.is_lazy(tensor)
    value = None if lazy else tensor.detach().double().nan_to_num(7.25).tolist()
    shape = None if lazy else tuple(tensor.shape)
    return type(tensor).__name__, tensor.requires_grad, tensor.dtype, shape, value, tensor.device.type


def shared(module):
    """Which tensors change with which: each is written to in turn. Spoils the values."""
    tensors = {name: tensor.detach() for name, tensor in tensors_of(module).items()
               if not torch.nn.parameter.is_lazy(tensor) and tensor.numel()}  # fmt: skip
    found = set()
    for name, tensor in tensors.items():
        before = {other: value.clone() for other, value in tensors.items()}
        tensor.fill_(float(tensor.double().mean().nan_to_num(1)) // 1 + 100)
        found |= {(name, other) for other, value in tensors.items() if not same(value, before[other])}
        for other, value in before.items():
            tensors[other].copy_(value)
    return found


def same(one, other):
    return torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25))


def identical(module):
    """Names that are one object."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors_of(module).items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(map(sorted, groups.values()))


def looks(module, tied=()):
    """Everything but sharing."""
    return {
        "tensors": {name: described(tensor) for name, tensor in tensors_of(module).items()},
        "state": list(module.state_dict()),
        "one object": identical(module),
        "notes": [without(getattr(item, "notes", None), tied) for item in module.modules()],
        "told": [without(getattr(item, "told", None), tied) for item in module.modules()],
        "extra": [getattr(item, "extra", None) for item in module.modules()],
        "held": [kind(getattr(item, "held", None)) for item in module.modules()],
        "held values": [listed(getattr(item, "held", None)) for item in module.modules()],
        "marks": [getattr(tensor, "mark", None) for tensor in tensors_of(module).values()],
        "hooks": [len(item._load_state_dict_pre_hooks) for item in module.modules()],
        "modules": [(name, type(item).__name__) for name, item in module.named_modules()],
    }


def cast(tensor, dtype):
    """As a load with ``dtype=`` leaves it."""
    if torch.nn.parameter.is_lazy(tensor) or not tensor.is_floating_point():
        return tensor
    made = tensor.detach().to(dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def listed(tensor):
    lazy = tensor is None or torch.nn.parameter.is_lazy(tensor)
    return None if lazy else tensor.detach().double().nan_to_num(7.25).tolist()


def without(noted, tied):
    """What a tied name provides is missing for torch alone."""
    if isinstance(noted, (list, tuple)):
        return [without(item, tied) for item in noted if not (isinstance(item, str) and item in tied)]
    return noted


@dataclass
class Wanted:
    """What torch does. ``refused``: what it raised, whichever keys are missing."""

    module: nn.Module
    missing: list[str]
    unexpected: list[str]
    error: Exception | None


def wanted_of(program, state):
    module = build(program)
    try:
        keys = module.load_state_dict(state, strict=False)
    except Exception as error:
        return Wanted(module, [], [], error)
    return Wanted(module, list(keys.missing_keys), list(keys.unexpected_keys), None)


def has_post_hooks(module):
    return any(item._load_state_dict_post_hooks for item in module.modules())


def contradicts(plan):
    """Whether two names of one memory got different values: docs/plan.md says what is done then."""
    return bool(plan.decisions.checks)


def exchanged(module):
    """A mapping of the module's own tensors under each other's names: torch would read what it has overwritten."""
    kinds: dict[Any, list[str]] = {}
    state = module.state_dict()
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and not torch.nn.parameter.is_lazy(value):
            kinds.setdefault(kind(value), []).append(name)
    mapping = {name: state[names[at - 1]] for names in kinds.values() for at, name in enumerate(names)}
    copies = cloned(mapping)
    return (lambda: mapping), (lambda: cloned(copies))


def check(program, state, form, strict, way, dtype=None):
    """Load in one way, and compare with torch."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = stored(state, form, folder)
        existing = build(program) if way == "existing" else None
        if form == "plain" and existing is not None:
            ours, theirs = exchanged(existing)
        wanted = wanted_of(program, theirs())
        objects = {} if existing is None else tensors_of(existing)
        before = None if existing is None else looks(existing)
        subject = functools.partial(build, program) if existing is None else existing
        try:
            plan = wl.plan(subject, ours(), strict=strict, defer=way != "ordinary", dtype=dtype)
        except Exception as error:
            assert wanted.error is not None, f"plan raised {error!r}"
            assert (type(error), str(error)) == (type(wanted.error), str(wanted.error))
            return
        if existing is not None:
            assert looks(existing) == before, "planning changed the module"
        tied = set(plan.report.tied)
        missing = [name for name in wanted.missing if name not in tied]
        refuse = wanted.error is not None or (strict and (missing or wanted.unexpected))
        if refuse:
            if contradicts(plan) and not plan.problems:
                return
            assert plan.problems, f"not refused: {wanted.error or (missing, wanted.unexpected)}"
            with pytest.raises(wl.PlanError):
                plan.execute()
            if existing is not None:
                assert looks(existing) == before, "a refused plan changed the module"
            if wanted.error is None:
                same_keys(plan, wanted, missing)
            return
        assert not plan.problems, f"refused: {plan.problems}"
        try:
            loaded = plan.execute()
        except wl.PlanError:
            assert strict and contradicts(plan)
            return
        final = plan._final
        if final.left_out or any(row.untied for row in final.rows):
            return
        same_keys(plan, wanted, missing)
        if dtype is not None:
            assert {name: described(tensor) for name, tensor in tensors_of(loaded).items()} == {
                name: described(cast(tensor, dtype)) for name, tensor in tensors_of(wanted.module).items()
            }, "cast"
            return
        found, expected = looks(loaded, tied), looks(wanted.module, tied)
        differing = [f"{what}: {found[what]} ≠ {expected[what]}" for what in found if found[what] != expected[what]]
        assert not differing, "; ".join(differing)
        if existing is not None:
            kept = {name for name, tensor in tensors_of(loaded).items() if objects.get(name) is tensor}
            assert kept >= kept_by_torch(program, theirs()), "another object"
        found, expected = shared(loaded), shared(wanted.module)
        assert found == expected, f"shared: {found - expected} {expected - found}"


def kept_by_torch(program, state):
    module = build(program)
    alive = tensors_of(module)  # so that no other object gets the place of one of these
    module.load_state_dict(state, strict=False)
    return {name for name, tensor in tensors_of(module).items() if alive.get(name) is tensor}


def same_keys(plan, wanted, missing):
    if has_post_hooks(wanted.module):
        return
    assert set(plan.report.missing_keys) == set(missing), "missing"
    assert set(plan.decisions.announced_unexpected) == set(wanted.unexpected), "unexpected"


@pytest.fixture(autouse=True)
def _quiet():
    log = logging.getLogger("weightlift")
    before = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(before)


@SEARCH
@given(
    programs,
    edits,
    st.sampled_from(["mapping", "plain", "pt", "safetensors"]),
    st.booleans(),
    st.sampled_from(["deferred", "existing", "ordinary"]),
    st.sampled_from([None, None, torch.bfloat16]),
)
def test_a_load_does_what_load_state_dict_does(program, changes, form, strict, way, dtype):
    try:
        state = state_for(program, changes)
    except RuntimeError:
        return
    check(program, state, form, strict, way, dtype)
