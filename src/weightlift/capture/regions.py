"""Which modules run inside code that ``torch.compile`` or TorchScript made, where no hook of a capture can see them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import nn

from weightlift.capture.choice import Choice
from weightlift.capture.select import Selected, children, compiled_wrapper, original, path_to, scripted
from weightlift.errors import CaptureError, Problem

_HINT = "use wl.recorder(model, …), which captures in compiled code"


class InCompiledCode(CaptureError):
    """A `CaptureError` of what no hook can see, and a recorder can."""


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


def _script_around(root: nn.Module, fqn: str) -> Selected | None:
    """The outermost TorchScript module that contains ``fqn``, unless it is that itself."""
    return next((item for item in path_to(root, fqn) if scripted(item.module) and item.fqn != fqn), None)


def inside_scripts(model: nn.Module, choice: Choice) -> list[Problem]:
    """What is wanted and never called from Python, so that neither a capture nor a recorder sees it."""
    if not _any_met(model, choice.fqns(), scripted):
        return []
    problems = []
    for name, fqn in choice.named():
        if (script := _script_around(model, fqn)) is not None:
            where = f"{script.fqn!r}" if script.fqn else "the model"
            what = f"tap {name!r} lies inside a TorchScript module ({where} was made by torch.jit)"
            hint = f"take {where} itself, or build the model without torch.jit: what lies inside runs without hooks"
            problems.append(Problem(what, fqn=fqn, hint=hint))
    return problems


def inside_compiled(model: nn.Module, choice: Choice) -> list[Problem]:
    """What is wanted and can't be seen by hooks."""
    if "torch._dynamo" not in sys.modules or not _any_met(model, choice.fqns(), _compiled):
        return []
    problems = []
    for name, fqn in choice.named():
        region = region_of(model, fqn)
        if region is not None:
            where = region.fqn or "the model"
            what = f"tap {name!r} lies inside compiled code ({where} was given to torch.compile)"
            problems.append(Problem(what, fqn=fqn, hint=_HINT))
    return problems


def _compiled(module: nn.Module) -> bool:
    return compiled_wrapper(module) or compiled_in_place(module)


def _any_met(model: nn.Module, names: set[str], kind: Callable[[nn.Module], bool]) -> bool:
    """A quick look along the paths of what is wanted: whether any module there is of a kind."""
    seen: dict[str, nn.Module | None] = {"": model}
    return kind(model) or any(_look(seen, fqn, kind) for fqn in names)


def _look(seen: dict[str, nn.Module | None], fqn: str, kind: Callable[[nn.Module], bool]) -> bool:
    """Whether a module on the way to ``fqn`` is of a kind; each is looked at once."""
    if fqn in seen:
        return False
    parent, _, name = fqn.rpartition(".")
    if _look(seen, parent, kind):
        return True
    above = seen[parent]
    module = seen[fqn] = None if above is None else children(above).get(name)
    return module is not None and kind(module)
