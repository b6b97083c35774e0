"""Which modules a selector means. A model is walked once per selector; later captures only check that it stands."""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from weightlift.capture.taps import OWN_TAPS, Tap
from weightlift.errors import CaptureError, Problem
from weightlift.locks import Lock
from weightlift.patterns import is_wild

_KEPT = 32  # resolved selectors per model
_COMPARED = 4000
_FEW = 8


@dataclass(frozen=True, slots=True)
class Selected:
    """A module and the first of its names."""

    fqn: str
    module: nn.Module


def compiled_wrapper(module: nn.Module) -> bool:
    """Whether this is what ``torch.compile(module)`` returns. Its original stands under the same name."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def original(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    while compiled_wrapper(module):
        module = module._orig_mod  # type: ignore[assignment]
    return module


def scripted(module: nn.Module) -> bool:
    """Whether TorchScript made it: only it itself is called from Python, what is within it runs without hooks."""
    return isinstance(module, ScriptModule)


def own_taps(model: nn.Module) -> dict[str, Tap]:
    """What the model's class gives names to with `weightlift.records`, and those that it derives from, whose forward it
    may have overridden."""
    taps: dict[str, Tap] = {}
    for kind in reversed(type(original(model)).__mro__):
        taps |= getattr(kind.__dict__.get("forward"), OWN_TAPS, {})  # TorchScript's classes have no forward
    return taps


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own children, those of what was wrapped for a wrapper of ``torch.compile``."""
    modules = original(module)._modules
    return dict(modules.items()) if scripted(module) else modules  # TorchScript's is no dictionary


def path_to(root: nn.Module, fqn: str) -> Iterator[Selected]:
    """The modules from the root to ``fqn``, both included, as far as they exist."""
    module: nn.Module = root
    yield Selected("", root)
    done = ""
    for name in fqn.split(".") if fqn else []:
        child = children(module).get(name)
        if child is None:
            return
        module, done = child, f"{done}.{name}" if done else name
        yield Selected(done, module)


def at(root: nn.Module, fqn: str) -> nn.Module | None:
    """What stands under a name now."""
    *_, last = path_to(root, fqn)
    return last.module if last.fqn == fqn else None


def walk(root: nn.Module) -> Iterator[Selected]:
    """Every module once, under the first of its names, parents first; wrappers instead of what they wrap."""
    seen: set[int] = set()
    waiting: list[Selected] = [Selected("", root)]
    while waiting:
        item = waiting.pop()
        inner = original(item.module)
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        yield item
        prefix = f"{item.fqn}." if item.fqn else ""
        kids = list(inner._modules.items())  # another thread may change them now
        waiting.extend(Selected(prefix + name, child) for name, child in reversed(kids) if child is not None)


class _Died:
    """Called once a module is gone. It does not know the `Watch` that asks it, which goes with its last reference."""

    __slots__ = ("any",)

    def __init__(self) -> None:
        self.any = False

    def __call__(self, _: object) -> None:
        self.any = True


class Watch:
    """Remembers the children of modules, by identity and holding nothing, to tell later whether they changed.

    `stands` runs with every capture, so it is a few loops in C. Most modules have no children: of those it keeps the
    empty dictionary itself, which holds nothing alive and fills when the module gets some.

    ``classes``: also the class of each module, of which the first has all others within it.
    """

    def __init__(self, modules: Iterable[nn.Module], *, classes: bool = False) -> None:
        own = {id(module): module for module in map(original, modules)}.values()
        kids = [child for module in own for child in list(module._modules.values()) if child is not None]
        self._died = _Died()
        # An id can be used again once its owner died: then the callback has told us.
        self._alive = [weakref.ref(module, self._died) for module in (*own, *kids)]
        self._watched = self._alive[: len(own)]
        self._childless = [module._modules for module in own if _bare(module)]
        self.classes = classes
        parents = [module for place, module in enumerate(own) if not _bare(module) or (classes and place == 0)]
        self._parents = [weakref.ref(module) for module in parents]
        self._seen = self._look()

    def _look(self) -> list[Any]:
        """How many children each parent has, and their identities."""
        seen: list[Any] = []
        for parent in self._parents:
            names = parent()._modules  # type: ignore[union-attr]
            seen.append(len(names))
            seen.extend(map(id, names.values()))
            if self.classes:
                seen.append(type(parent()))
                seen.extend(map(type, names.values()))
        return seen

    def watched(self) -> list[nn.Module]:
        """The modules, as far as they live."""
        return [module for reference in self._watched if (module := reference()) is not None]

    def children(self) -> list[Any]:
        """The dictionaries of children: how many they hold together tells at once whether any came since."""
        return [*[parent()._modules for parent in self._parents], *self._childless]  # type: ignore[union-attr]

    def stands(self) -> bool:
        if self._died.any or any(self._childless):
            return False
        try:
            return self._look() == self._seen
        except (AttributeError, RuntimeError):  # one died, or another thread adds a module just now
            return False


def merged(watches: Sequence[Watch]) -> list[Watch]:
    """Many as one, but for those of classes: taps that name one layer each watch the same list of layers."""
    plain = [watch for watch in watches if not watch.classes]
    if len(plain) <= _FEW:  # which costs more than it saves
        return list(watches)
    one = Watch([module for watch in plain for module in watch.watched()])
    if not all(watch.stands() for watch in plain):  # changed just now, which ``one`` has not seen
        return list(watches)
    return [one, *(watch for watch in watches if watch.classes)]


def _bare(module: nn.Module) -> bool:
    """Whether a module has no children, and a plain dictionary for them: that of a scripted module holds the module."""
    return not module._modules and type(module._modules) is dict


@dataclass(frozen=True)
class Found:
    """What a selector or a declaration was resolved to. It holds no module; ``extra`` is the finder's own."""

    fqns: tuple[str, ...]
    modules: tuple[weakref.ref[nn.Module], ...]
    watch: Watch
    extra: Any = None

    def selected(self) -> list[Selected] | None:
        """The modules, or None when one of them is no more."""
        modules = [reference() for reference in self.modules]
        if any(module is None for module in modules):
            return None
        return [Selected(fqn, module) for fqn, module in zip(self.fqns, modules) if module is not None]


def found(
    items: Sequence[Selected], visited: Sequence[nn.Module], extra: Any = None, *, classes: bool = False
) -> Found:
    references = tuple(weakref.ref(item.module) for item in items)
    return Found(tuple(item.fqn for item in items), references, Watch(visited, classes=classes), extra)


# By identity: a module may define equality, or not be hashable.
_cache: dict[int, tuple[weakref.ref[nn.Module], OrderedDict[Any, Any]]] = {}
_lock = Lock()


def _kept(root: nn.Module) -> OrderedDict[Any, Any]:
    entry = _cache.get(id(root))
    if entry is None or entry[0]() is not root:
        key = id(root)
        entry = weakref.ref(root, lambda _: _cache.pop(key, None)), OrderedDict()
        _cache[key] = entry
    return entry[1]


def kept_for(root: nn.Module, key: Any) -> Any:
    """What `keep_for` kept, or None."""
    entry = _cache.get(id(root))
    return entry[1].get(key) if entry is not None and entry[0]() is root else None


def keep_for(root: nn.Module, key: Any, value: Any) -> None:
    """Keeps a value that holds no module as long as ``root`` lives, and as long as it is among the latest."""
    with _lock.own:
        kept = _kept(root)
        kept[key] = value
        kept.move_to_end(key)
        while len(kept) > _KEPT:
            kept.popitem(last=False)


def remembered(
    root: nn.Module, key: Any, find: Callable[[], Found], watches: list[Watch]
) -> tuple[list[Selected], Any]:
    """What ``find`` finds, from the cache as long as the part of the tree it looked at is what it was. Thread-safe."""
    known: Found | None = kept_for(root, key)
    if known is not None and known.watch.stands():
        selected = known.selected()
        if selected is not None:
            watches.append(known.watch)
            return selected, known.extra
    while True:
        new = find()
        if (selected := new.selected()) is not None:
            break  # else another thread has taken one out of the model just now
    keep_for(root, key, new)
    watches.append(new.watch)
    return selected, new.extra


def select(root: nn.Module, selector: Any, watches: list[Watch]) -> list[Selected]:
    """The modules that ``selector`` means, in the model's order; ``watches`` gets what tells whether that still holds.

    Raises:
        CaptureError: it means none; the message names those that come nearest.
    """
    if isinstance(selector, list | tuple):
        chosen: dict[int, Selected] = {}
        for part in selector:
            for item in select(root, part, watches):
                chosen.setdefault(id(item.module), item)
        return list(chosen.values())
    if isinstance(selector, nn.Module):
        return _by_module(root, selector, watches)
    if isinstance(selector, str):
        return remembered(root, selector, lambda: _by_pattern(root, selector), watches)[0]
    if isinstance(selector, type):
        return remembered(root, selector, lambda: _by_class(root, selector), watches)[0]
    everything = list(walk(root))
    items = [item for item in everything if selector(item.fqn, original(item.module))]
    if not items:
        raise _nothing(root, f"the predicate {selector!r} chose no module")
    watches.append(Watch([item.module for item in everything], classes=True))
    return items


def _by_module(root: nn.Module, wanted: nn.Module, watches: list[Watch]) -> list[Selected]:
    def find() -> Found:
        everything = list(walk(root))
        items = [item for item in everything if item.module is wanted or original(item.module) is wanted]
        if not items:
            raise _nothing(root, f"this {type(wanted).__name__} is no part of the model")
        return found(items, [item.module for item in everything])

    return remembered(root, ("module", id(wanted)), find, watches)[0]


def _by_class(root: nn.Module, wanted: type) -> Found:
    everything = list(walk(root))
    items = [item for item in everything if isinstance(original(item.module), wanted)]
    if not items:
        raise _nothing(root, f"no module is a {wanted.__name__}", _class_names(everything), wanted.__name__)
    return found(items, [item.module for item in everything], classes=True)


def _by_pattern(root: nn.Module, pattern: str) -> Found:
    visited: dict[tuple[int, frozenset[int]], nn.Module] = {}
    items: dict[int, Selected] = {}
    for item in _expand(Selected("", root), pattern.split(".") if pattern else [], {0}, visited):
        items.setdefault(id(original(item.module)), item)
    if not items:
        raise _nothing(root, f"no module matches {pattern!r}", [item.fqn for item in walk(root)], pattern)
    return found(list(items.values()), list(visited.values()))


def _expand(
    item: Selected, segments: list[str], reached: set[int], visited: dict[tuple[int, frozenset[int]], nn.Module]
) -> Iterator[Selected]:
    """What matches at or below a module, in the model's order. ``reached``: how many segments the name may stand for.

    What is met again, shared by two parents or within itself, has been seen to under its first name.
    """
    for place in sorted(reached):
        while place < len(segments) and segments[place] == "**":  # which also stands for nothing
            place += 1
            reached.add(place)
    key = id(original(item.module)), frozenset(reached)
    if key in visited:
        return
    if len(segments) in reached:
        yield item
    if reached == {len(segments)}:
        return
    visited[key] = item.module
    prefix = f"{item.fqn}." if item.fqn else ""
    kids = children(item.module)
    here = {segments[place] for place in reached if place < len(segments)}
    if len(here) == 1 and not any(map(is_wild, here)):  # looked up: it may be one of thousands of layers
        kids = {name: kids[name] for name in here if name in kids}
    for name, child in list(kids.items()):
        if child is not None:
            further = {place if segments[place] == "**" else place + 1
                       for place in reached if place < len(segments) and _matches(name, segments[place])}  # fmt: skip
            if further:
                yield from _expand(Selected(prefix + name, child), segments, further, visited)


def _matches(name: str, segment: str) -> bool:
    return segment == "**" or fnmatch.fnmatchcase(name, segment)


def _class_names(items: Sequence[Selected]) -> list[str]:
    return list(dict.fromkeys(type(original(item.module)).__name__ for item in items))


def _nothing(root: nn.Module, what: str, names: Sequence[str] = (), wanted: str = "") -> CaptureError:
    hint = "names are those of model.named_modules(); * is one part of a name, ** any number of them"
    near = nearest(wanted, names)
    if near:
        hint = f"did you mean {', '.join(map(repr, near))}?"
    elif names:
        known = dict.fromkeys(_folded(name) for name in names[:_COMPARED] if name)
        shown = sorted(known, key=lambda name: name.count("."))
        hint = f"there are {', '.join(map(repr, shown[:8]))}{', …' * (len(shown) > 8)}; {hint}"
    return CaptureError(f"nothing to capture in {type(root).__name__}", [Problem(what, hint=hint)])


def _folded(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def nearest(wanted: str, names: Sequence[str]) -> list[str]:
    """Up to three names that may have been meant, digits standing for ``*``."""
    folded: dict[str, str] = {}
    for name in names[:_COMPARED]:
        folded.setdefault(_folded(name), name)
    matches = difflib.get_close_matches(_folded(wanted), list(folded), n=3, cutoff=0.5)
    return [match if "*" in wanted else folded[match] for match in matches]
