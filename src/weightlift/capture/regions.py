"""Which modules run inside code that ``torch.compile`` made, where no hook of an eager capture can see them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from weightlift.capture.declared import Wanted
from weightlift.capture.select import Selected, children, compiled_wrapper, original, path_to
from weightlift.capture.taps import Tap
from weightlift.errors import Problem

_HINT = "use wl.recorder(model, …), which captures in compiled code"


def names_of(chosen: dict[int, list[Selected]], wanted: Wanted | None) -> set[str]:
    """The names of all modules that a choice of taps looks at."""
    names = {item.fqn for items in chosen.values() for item in items}
    return names if wanted is None else names | {site.fqn for site in wanted.sites}


def compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: its own hooks are inside, too."""
    return module._compiled_call_impl is not None


def region_of(root: nn.Module, fqn: str) -> Selected | None:
    """The outermost compiled module that contains ``fqn``, itself included if its own hooks are inside."""
    for item in path_to(root, fqn):
        if compiled_in_place(item.module) or compiled_in_place(original(item.module)):
            return item
        if compiled_wrapper(item.module) and item.fqn != fqn:
            return item
    return None


def inside_compiled(
    model: nn.Module, taps: Sequence[tuple[str, Tap]], chosen: dict[int, list[Selected]], wanted: Wanted | None
) -> list[Problem]:
    """What is wanted and can't be seen by hooks."""
    if "torch._dynamo" not in sys.modules or not _any_compiled(model, names_of(chosen, wanted)):
        return []
    names = [(name, item.fqn) for number, (name, _) in enumerate(taps) for item in chosen.get(number, ())]
    if wanted is not None:
        names += [(site.key, site.fqn) for site in wanted.sites]
    problems = []
    for name, fqn in names:
        region = region_of(model, fqn)
        if region is not None:
            where = region.fqn or "the model"
            what = f"tap {name!r} lies inside compiled code ({where} was given to torch.compile)"
            problems.append(Problem(what, fqn=fqn, hint=_HINT))
    return problems


def _any_compiled(model: nn.Module, names: set[str]) -> bool:
    """A quick look along the paths of what is wanted."""
    seen: dict[str, nn.Module | None] = {"": model}
    if compiled_wrapper(model) or compiled_in_place(model):
        return True
    return any(_look(seen, fqn) for fqn in names)


def _look(seen: dict[str, nn.Module | None], fqn: str) -> bool:
    """Whether a module on the way to ``fqn`` is compiled; each is looked at once."""
    if fqn in seen:
        return False
    parent, _, name = fqn.rpartition(".")
    if _look(seen, parent):
        return True
    above = seen[parent]
    module = seen[fqn] = None if above is None else children(above).get(name)
    return module is not None and (compiled_wrapper(module) or compiled_in_place(module))
