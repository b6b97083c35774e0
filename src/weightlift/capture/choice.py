"""What the taps of a capture mean in a model, once they are resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightlift.capture.declared import Resolved, enclosing
from weightlift.capture.select import Selected
from weightlift.capture.taps import Declared, Output, Tap
from weightlift.errors import CaptureError, Problem


@dataclass(frozen=True)
class Choice:
    """``taps`` by their numbers, with their names; ``modules``: what each of them selects; ``declared``: what those
    that ask for something declared mean, if any does."""

    taps: tuple[tuple[str, Tap], ...]
    modules: Mapping[int, list[Selected]]
    declared: Resolved | None

    def fqns(self) -> set[str]:
        """The names of all modules that are looked at."""
        return {fqn for _, fqn in self.named()}

    def named(self) -> list[tuple[str, str]]:
        """For everything that is wanted the name of its tap, or its key, and of its module."""
        names = [(name, item.fqn) for n, (name, _) in enumerate(self.taps) for item in self.modules.get(n, ())]
        sites = () if self.declared is None else self.declared.sites
        return names + [(site.key, site.fqn) for site in sites]

    def declaring(self) -> dict[int, Declared]:
        """The taps that ask for something declared, by their numbers."""
        return {number: tap for number, (_, tap) in enumerate(self.taps) if isinstance(tap, Declared)}

    def givers(self) -> dict[int, list[Selected]]:
        """For each of those the modules that belong to it."""
        wanted = self.declared
        if wanted is None:
            return {}
        scopes = {scope.fqn for scope, _ in wanted.scopes}
        return {
            number: [
                Selected(site.fqn, wanted.modules[site.fqn])
                for site in wanted.sites
                if site.key == key and enclosing(site.fqn, scopes) == scope.fqn
            ]
            for scope, pairs in wanted.scopes
            for key, number in pairs
        }

    def awaited(self) -> dict[tuple[int, str], int] | None:
        """With ``stop``: how many calls of each module must be seen before the forward is left. Raises CaptureError."""
        if not any(isinstance(tap, Output) and tap.stop for _, tap in self.taps):
            return None
        problems = []
        if self.declared is not None:
            problems.append(Problem("stop and declared outputs", hint="those are known when the forward ends"))
        counts = {}
        for number, (name, tap) in enumerate(self.taps):
            if isinstance(tap, Output):
                if tap.calls is not None and min(tap.calls) < 0:
                    what = f"stop with the negative calls of tap {name!r}"
                    problems.append(Problem(what, hint="the end is not reached"))
                for item in self.modules[number]:
                    counts[number, item.fqn] = 1 if tap.calls is None else max(tap.calls) + 1
        if problems:
            raise CaptureError("a forward can't be stopped early for this", problems)
        return counts
