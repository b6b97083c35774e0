"""What hooks and overrides of modules made up at random do to a state dict, to their module and to its children."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
