"""A structural twin of a model, for captures inside compiled code.

The modules on the way to what is wanted are copied shallowly: new module objects of the same classes, which share every
parameter, buffer and untouched sub-module with the model. The taps stand on the copies, so the model itself is left
alone. What is recorded goes to a list that belongs to the thread and the call.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import nn
from torch.compiler import is_dynamo_compiling

from weightlift.capture.actions import argument_place, parameters_of, put_argument, take_argument
from weightlift.capture.declared import Site
from weightlift.capture.edits import edit, edits
from weightlift.capture.gathering import Gather, first_of, gather_site, given
from weightlift.capture.hooks import FAILURE_ID, HOOK_ID
from weightlift.capture.select import original, scripted
from weightlift.capture.values import Lack, Recipe, finish, pick, put

_TWIN_ID = FAILURE_ID - 1
_COMPILED_FROM = "_torchdynamo_orig_callable"  # of what torch.compile makes of a function
Function = TypeVar("Function", bound=Callable[..., Any])


class Left(BaseException):
    """The rest of a traced forward is not wanted. Not an Exception, so that no model's own ``except`` keeps it."""


@dataclass(frozen=True)
class Take:
    """One tap at one module, as the twin's hooks need it."""

    number: int
    name: str
    fqn: str
    recipe: Recipe
    before: bool


@dataclass
class Sites:
    """Everything that happens at one module."""

    takes: list[Take]
    gather: Gather | None = None
    declared: list[Site] | None = None
    held: bool = False  # what is declared here may belong to a sub-model that runs around this twin


Link: TypeAlias = "tuple[nn.Module, str, nn.Module | None, nn.Module | None]"


@dataclass(frozen=True, eq=False)
class Twin:
    """``originals``: the modules that were copied; ``links``: their children as they were then, parents first: parent,
    name, child, and what ``torch.compile`` wrapped in it."""

    root: nn.Module
    originals: tuple[nn.Module, ...]
    links: tuple[Link, ...]

    def stands(self) -> bool:
        """Whether the children of every copied module are still what they were.

        Where it is traced, a wrapper is to torch what it wraps, may be met once, and not after that.
        """
        traced = is_dynamo_compiling()
        for parent, name, child, inner in self.links:
            if parent._modules.get(name) is not (inner if traced else child):
                return False
        return sum([len(module._modules) for module in self.originals]) == len(self.links)


Wrap = Callable[[nn.Module, nn.Module], "Callable[..., Any] | None"]


def build_twin(
    root: nn.Module, sites: Mapping[int, Sites], cell: Any, training: bool | None, wrap: Wrap | None = None
) -> Twin:
    """Copies what leads to ``sites`` (by the ids of originals).

    ``training``: the mode of the copies, None for that of the originals. ``wrap`` may give a copy another forward.
    """
    made: dict[int, nn.Module] = {}
    originals: list[nn.Module] = []
    links: list[Link] = []

    def make(outer: nn.Module) -> nn.Module:
        module = original(outer)
        if id(module) in made:
            return outer if original(made[id(module)]) is module else made[id(module)]
        made[id(module)] = outer  # a module that contains itself ends here
        replaced = {}
        children = {} if scripted(module) else dict(module._modules)
        for name, child in children.items():
            if child is not None:
                twin = make(child)
                if twin is not child:
                    replaced[name] = twin
        own = sites.get(id(module))
        if not replaced and own is None:
            return outer
        inner = {name: None if kid is None else original(kid) for name, kid in children.items()}
        links.extend((module, name, kid, inner[name]) for name, kid in reversed(children.items()))
        if wrap is None:  # it is to be traced whole
            children = inner
        copied = _shallow(module, {**children, **replaced}, bool(replaced))
        if training is not None and not scripted(module):
            copied.__dict__["training"] = training
        forward = None if wrap is None else wrap(outer, copied)
        if forward is not None:
            copied.__dict__["forward"] = forward
        if own is not None:
            _stand(copied, own, cell, parameters_of(module))
        made[id(module)] = copied
        if scripted(module):  # which has its mode and its parts elsewhere, shared with the copy
            return copied
        originals.append(module)
        return copied

    return Twin(make(root), tuple(originals), tuple(reversed(links)))


def _shallow(module: nn.Module, children: dict[str, nn.Module | None], leads: bool) -> nn.Module:
    """``leads``: to other copies."""
    copied: nn.Module = object.__new__(type(module))
    own = module.__dict__
    if leads and "forward" in own:
        own = {**own, "forward": _not_compiled(own["forward"])}
    attributes = {name: _bound_anew(value, module, copied) for name, value in own.items()}
    if not scripted(module):
        attributes["_modules"] = children
    attributes["_compiled_call_impl"] = None
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        # Its own: an eager capture comes and goes in the model's, and that must be nothing to compiled code.
        for hooks in (name, f"{name}_with_kwargs"):
            attributes[hooks] = OrderedDict(module.__dict__[hooks])
            attributes[hooks].pop(HOOK_ID, None)
            attributes[hooks].pop(FAILURE_ID, None)
    copied.__dict__.update(attributes)
    return copied


def _bound_anew(value: Any, module: nn.Module, copied: nn.Module) -> Any:
    """Methods that were set on the instance (accelerate's hooks do so) belong to the copy."""
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, copied)
    if isinstance(value, functools.partial) and any(argument is module for argument in value.args):
        args = [copied if argument is module else argument for argument in value.args]
        return functools.update_wrapper(functools.partial(value.func, *args, **value.keywords), value.func)
    return value


def _not_compiled(value: Any) -> Any:
    """Of ``model.forward = torch.compile(model.forward)`` the method: the code would run the model's own modules."""
    return getattr(value, _COMPILED_FROM, value) if isinstance(value, types.FunctionType) else value


def with_own_code(function: Function, name: str) -> Function:
    """The same function with code of its own: torch keeps what it compiled by code object, only so many for each, and
    does not look whether hooks are others."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, None, function.__closure__)  # type: ignore[return-value]


def _stand(copied: nn.Module, sites: Sites, cell: Any, names: tuple[str, ...]) -> None:
    """Puts the taps into dictionaries of the copy's own, after the user's hooks. ``names``: of the arguments."""
    own = copied.__dict__
    # Not that of a capture, which a forward may open on the copies themselves; and they may be copied in turn.
    key = _TWIN_ID - len(own["_forward_hooks"]) - len(own["_forward_pre_hooks"])
    before = [take for take in sites.takes if take.before]
    after = [take for take in sites.takes if not take.before]
    if before or sites.gather is not None:
        own["_forward_pre_hooks"][key] = before_hook(before, sites.gather, cell, names)
        own["_forward_pre_hooks_with_kwargs"][key] = True
    if after or sites.declared or sites.gather is not None:
        declared = tuple(sites.declared or ())
        own["_forward_hooks"][key] = after_hook(after, sites.gather, declared, cell, sites.held)
        own["_forward_hooks_with_kwargs"][key] = True


def before_hook(takes: list[Take], gather: Gather | None, cell: Any, names: tuple[str, ...]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if gather is not None:
            cell.scopes.append((gather, {}))
        for tap in takes:
            value = place = argument_place(names, tap.recipe.index, args, kwargs)
            if not isinstance(place, Lack):
                value = take_argument(place, args, kwargs)
                if edits(tap.recipe, call_of(tap, cell)):
                    value = edit(value, tap.recipe, tap.name, tap.fqn)
                    args, kwargs = put_argument(place, args, kwargs, value)
                value = finish(value, tap.recipe)
            cell.entries.append((tap.number, tap.fqn, value))
            arrived(cell, tap)
        return args, kwargs

    return hook


def after_hook(
    takes: list[Take], gather: Gather | None, declared: tuple[Site, ...], cell: Any, held: bool
) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        for tap in takes:
            value = pick(output, tap.recipe.index)
            if not isinstance(value, Lack):
                if edits(tap.recipe, call_of(tap, cell)):
                    value = edit(value, tap.recipe, tap.name, tap.fqn)
                    output = put(output, tap.recipe.index, value)
                value = finish(value, tap.recipe)
            cell.entries.append((tap.number, tap.fqn, value))
            arrived(cell, tap)
        for site in declared:
            if cell.scopes:
                running, lists = cell.scopes[-1]
                if site.key in running.keys:
                    gather_site(site, lists, running, args, kwargs, output)
            elif held and (value := given(site, output)) is not None:
                cell.held.append((site.fqn, site.key, first_of(args, kwargs) if site.initial else None, value))
        if gather is not None:
            _, lists = cell.scopes.pop()
            for number, entries, lacking in gather.gathered(lists, output):
                if lacking is not None:
                    cell.entries.append((number, None, lacking))
                for entry in entries:
                    cell.entries.append((number, entry.fqn, entry.value))
        return output

    return hook


def call_of(take: Take, cell: Any) -> int:
    """Which call of the module this is, where that matters."""
    if take.recipe.calls is None:
        return 0
    return len([fqn for number, fqn, _ in cell.entries if number == take.number and fqn == take.fqn])


def arrived(cell: Any, tap: Take) -> None:
    """Counts a call, and leaves the forward when it was the last that anybody waits for."""
    if cell.left is None:
        return
    left = cell.left.get((tap.number, tap.fqn), 0) - 1
    if left > 0:
        cell.left[tap.number, tap.fqn] = left
    elif left == 0:
        del cell.left[tap.number, tap.fqn]
    if not cell.left:
        raise Left
