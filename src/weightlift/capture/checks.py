"""What must hold when a capture closes. Everything that does not is collected and raised once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from weightlift.capture.forwards import Forward
from weightlift.capture.result import (
    Entry,
    Recorded,
    lacking,
    let_go,
    no_such_calls,
    no_such_layers,
    out_of_reach,
    places,
)
from weightlift.capture.select import Selected, at, original
from weightlift.capture.session import Session
from weightlift.capture.taps import Declared, Output, Tap
from weightlift.capture.template import Template, choose
from weightlift.capture.values import Lack, Recipe, beyond, reached, recipe_of, untouched, written
from weightlift.errors import CaptureError, Problem

_COMPILED = "compiled code has no place for hooks: torch.compile(wl.recorder(model, …)) captures inside it"


def settle(session: Session, root: nn.Module, template: Template) -> list[Problem]:
    """Keeps of the entries what was asked for, and returns what is wrong."""
    if session.raw:
        session.settle_raw()
    if sum(map(len, session.children)) == session.count and _as_usual(session, template):
        return []
    problems = list(session.problems)
    _drop_failed(session)
    session.stopped |= any(not forward.done for forward in session.forwards)
    once = len(session.forwards) == 1 and all(map(len, session.fired))
    for number, (name, tap) in enumerate(template.taps):
        if isinstance(tap, Declared):
            problems += _declared(session, root, number, tap, template)
            continue
        if once and tap.calls is None and not session.lacks:
            continue  # the usual case: one forward, and every module ran
        fired = {fqn: session.fired[template.sites[number, fqn]] for fqn, _ in template.chosen[number]}
        problems += _calls(session, number, name, tap, fired)
        problems += _lacking(number, name, tap, session.lacks, session.entries)
        chosen = [Selected(fqn, session.held[template.places[key]]) for fqn, key in template.chosen[number]]
        problems += _fired(session, root, number, name, tap, chosen, fired)
    if not template.stands():
        problems += _added(session, root, template, {problem.fqn for problem in problems})
    problems += _written(session.entries, template)
    if session.detached:
        problems += _detached(session)
    for fqn in sorted(session.checkpointed):
        hint = "turn checkpointing off there: its recomputation would not see the edit"
        problems.append(Problem("an output was edited within torch.utils.checkpoint", fqn=fqn, hint=hint))
    return problems


def _as_usual(session: Session, template: Template) -> bool:
    """Whether nothing needs a second look: one forward, in which all ran and gave, and nobody wrote to it since."""
    if len(session.forwards) != 1 or not session.forwards[0].done or not all(session.fired):
        return False
    if session.problems or session.lacks or session.stopped or session.detached or session.checkpointed:
        return False
    if template.closely and (template.counting or not template.stands()):
        return False
    if not template.giving <= _gave(session):
        return False
    if _written_to(session.entries):
        return False
    return len({entry.tap for entry in session.entries}) == len(template.taps)


def _drop_failed(session: Session) -> None:
    """Forwards that did not end, because they failed, leave nothing."""
    for forward in [forward for forward in session.forwards if not (forward.done or forward.stopped)]:
        session.drop(forward)


def keep_ended(session: Session) -> None:
    """What an error that leaves the block has not undone: that of the forwards that had ended before."""
    session.settle_raw()
    _drop_failed(session)


def _gave(session: Session) -> set[str]:
    return set().union(*session.gave.values())


def _calls(session: Session, number: int, name: str, tap: Output, fired: dict[str, list[int | None]]) -> list[Problem]:
    if tap.calls is None:
        return []
    problems = []
    wanted: dict[str, set[int]] = {}
    kept = {(entry.fqn, entry.call) for entry in (*session.entries, *session.lacks) if entry.tap == number}
    for fqn, calls in fired.items():
        wanted[fqn], missing = places(tap.calls, len(calls))
        if missing and calls and tap.expect != "maybe":
            problems.append(no_such_calls(name, fqn, missing, len(calls)))
        if any(0 <= call < len(calls) and (fqn, call) not in kept for call in wanted[fqn]):
            problems.append(let_go(name, fqn))
    session.entries[:] = _wanted(session.entries, number, wanted)
    session.lacks[:] = _wanted(session.lacks, number, wanted)
    return problems


def _wanted(entries: Sequence[Entry], number: int, calls: dict[str, set[int]]) -> list[Entry]:
    """Of the entries of a tap only those of the wanted ``calls`` of each module."""
    return [entry for entry in entries if entry.tap != number or entry.call in calls[entry.fqn]]


def _lacking(number: int, name: str, tap: Output, lacks: Sequence[Entry], entries: Sequence[Entry]) -> list[Problem]:
    """What modules did not give that a tap takes, once for each. None is for ``expect`` to allow."""
    own = {entry.fqn: entry.value for entry in reversed(lacks) if entry.tap == number}
    if tap.expect == "maybe" or (tap.expect == "some" and any(entry.tap == number for entry in entries)):
        own = {fqn: lack for fqn, lack in own.items() if not lack.none}
    return [lacking(name, tap, fqn, own[fqn]) for fqn in reversed(own)]


def _fired(
    session: Session,
    root: nn.Module,
    number: int,
    name: str,
    tap: Output,
    chosen: list[Selected],
    calls: dict[str, list[int | None]],
) -> list[Problem]:
    if tap.expect == "maybe":
        return []
    if not any(calls.values()):
        what = "none of its modules was seen to run" if len(chosen) > 1 else "its module was not seen to run"
        why = _why(session, root, chosen[0], allowing="maybe")
        return [Problem(f"tap {name!r} recorded nothing: {what}", fqn=chosen[0].fqn, hint=why)]
    if tap.expect == "some" or (len(session.forwards) <= 1 and all(calls.values())):
        return []
    done = [run for run in session.forwards if run.done and not run.around and number not in run.resting]
    if session.stopped and not done:
        return []
    problems: list[Problem] = []
    for item in chosen:
        fired = calls[item.fqn]
        missed = _missed(fired, done)
        if fired and not missed:
            continue
        found = "no call" if not fired else f"none in {len(missed)} of {len(done)} forwards"
        problems.append(
            Problem(
                f"tap {name!r} did not fire as often as the model ran",
                fqn=item.fqn,
                expected="a call in every forward",
                found=found,
                hint=_why(session, root, item),
            )
        )
    return problems


def _missed(fired: Sequence[int | None], done: Sequence[Forward]) -> list[Forward]:
    """Forwards of the model without a call, if others have one. What is only called directly is in none of them."""
    within = {number for number in fired if number is not None}
    if not within:
        return []
    return [forward for forward in done if forward.number not in within]


def _why(session: Session, root: nn.Module, item: Selected, *, allowing: str = "some") -> str:
    """The likeliest reason why a module's hook did not see it run. ``allowing``: the ``expect`` that would allow it."""
    now = at(root, item.fqn)
    if now is not item.module:
        other = "nothing" if now is None else f"another {type(original(now)).__name__}"
        return f"it was replaced while the capture was open: {other} stands under its name now"
    if item.fqn in session.recomputed:
        return "it only ran within a backward pass, as a recomputation, and those are not recorded"
    if id(item.module) in session.elsewhere:
        return (
            "it ran in another thread or context: run the worker in contextvars.copy_context(), "
            "or give expect='maybe' if other requests share the model"
        )
    if type(original(item.module)).forward is nn.Module.forward:
        kind = type(original(item.module)).__name__
        return f"a {kind} is never called itself: {item.fqn + '.*'!r} means what it holds"
    if not session.forwards and not any(session.fired):
        why = "no forward of the model ran eagerly in the context that opened the capture"
        return f"{why} (where model.forward(…) is called, no hook runs: call the model); {_COMPILED}"
    skipped = "if it is skipped on purpose, or its parent reads its weights or calls another method of it than forward"
    return f"{skipped}, give expect={allowing!r}; if it was compiled: {_COMPILED}"


def _added(session: Session, root: nn.Module, template: Template, told: set[str | None]) -> list[Problem]:
    """What the taps mean by now, and did not when the capture was entered. ``told``: what is known to be wrong."""
    problems = []
    for number, (name, tap) in enumerate(template.taps):
        known = template.givers[number] if isinstance(tap, Declared) else template.chosen[number]
        watched = {id(original(session.held[template.places[key]])) for _, key in known}
        for item in _meant(root, name, tap):
            if id(original(item.module)) not in watched and item.fqn not in told:
                what = (
                    f"tap {name!r} missed a module, which came or became one that it means while the capture was open"
                )
                hint = "enter the capture when the model has it: if its first forward makes it, run one before"
                problems.append(Problem(what, fqn=item.fqn, hint=hint))
    return problems


def _meant(root: nn.Module, name: str, tap: Tap) -> list[Selected]:
    """The modules that a tap means now."""
    try:
        choice = choose(root, [(name, tap)], [])
    except CaptureError:  # none any more
        return []
    return (choice.givers() if isinstance(tap, Declared) else choice.modules)[0]


def _declared(session: Session, root: nn.Module, number: int, tap: Declared, template: Template) -> list[Problem]:
    if tap.expect == "maybe":
        return []
    fqn, key = template.scopes[number]
    calls = session.fired[template.sites[number, fqn]]
    name = fqn or "the model"
    if not calls and not session.stopped:
        what = "was not called in the context that opened the capture, or as model.forward(…), where no hook runs"
        hint = f"{name} {what}; {_COMPILED}"
        return [Problem(f"{tap.key!r} was not recorded", fqn=fqn, hint=hint)]
    if tap.layers is None and not any(entry.tap == number for entry in session.entries):
        hint = f"{name} ran and gave none"
        if "attentions" in key:
            hint = "the attention in use returns no weights: load the model with attn_implementation='eager'"
        return [Problem(f"{tap.key!r} was not recorded", fqn=fqn, hint=hint)]
    if tap.expect == "some":
        return []
    gave = _gave(session)
    missing = [(name, key) for name, key in template.givers[number] if name not in gave]
    return [
        Problem(
            f"{tap.key!r} lacks what this module should give",
            fqn=name,
            hint=_why(session, root, Selected(name, session.held[template.places[key]])),
        )
        for name, key in missing
    ]


def _written_to(entries: Sequence[Entry]) -> list[Entry]:
    """Those whose value somebody wrote to since it was taken."""
    return [entry for entry in entries if entry.version != -1 and written(entry.value, entry.version)]


def _written(entries: Sequence[Entry], template: Template) -> list[Problem]:
    hint = "give clone=True: the model works in place, so this is no longer the value that was taken"
    return [
        Problem(f"tap {template.names[entry.tap]!r} was written to after it was taken", fqn=entry.fqn, hint=hint)
        for entry in _written_to(entries)
    ]


def _detached(session: Session) -> list[Problem]:
    hint = "checkpoint with use_reentrant=False, or give detach=True if no gradient is wanted"
    return [
        Problem("a tensor was cut off from autograd by reentrant checkpointing", fqn=fqn, hint=hint)
        for fqn in sorted(session.detached)
    ]


def settle_recorded(
    raw: Sequence[Recorded], expected: Sequence[tuple[int, str, Tap, tuple[str, ...]]]
) -> tuple[list[Entry], list[Problem]]:
    """The same for one call of a recorder: ``raw`` is in call order, ``expected`` names each tap's modules."""
    counts: dict[tuple[int, str], int] = {}
    entries = []
    lacks = []
    problems = []
    for number, fqn, value in raw:
        if fqn is None:  # not a value, but what a declared tap lacks
            problems.append(no_such_layers(expected[number][1], "", *value))
            continue
        call = counts.get((number, fqn), 0)
        counts[number, fqn] = call + 1
        entry = Entry(number, fqn, value, call=call)
        if isinstance(value, Lack):
            lacks.append(entry)
        else:
            entries.append(entry)
    for number, name, tap, fqns in expected:
        if isinstance(tap, Declared):
            if tap.expect != "maybe" and tap.layers is None and not any(entry.tap == number for entry in entries):
                hint = "attention that returns no weights needs attn_implementation='eager'"
                problems.append(Problem(f"{tap.key!r} was not recorded", hint=hint))
            continue
        problems += _out_of_reach(name, recipe_of(tap), [entry for entry in entries if entry.tap == number])
        silent = [fqn for fqn in fqns if (number, fqn) not in counts]
        if silent and (tap.expect == "every" or (tap.expect == "some" and len(silent) == len(fqns))):
            hint = "it did not run, or not under its own name: layers in plain lists, on worker threads or copied"
            problems += [Problem(f"tap {name!r} did not fire", fqn=fqn, hint=hint) for fqn in silent]
        if tap.calls is not None:
            wanted: dict[str, set[int]] = {}
            for fqn in fqns:
                wanted[fqn], missing = places(tap.calls, counts.get((number, fqn), 0))
                if missing and (number, fqn) in counts and tap.expect != "maybe":
                    problems.append(no_such_calls(name, fqn, missing, counts[number, fqn]))
            entries = _wanted(entries, number, wanted)
            lacks = _wanted(lacks, number, wanted)
        problems += _lacking(number, name, tap, lacks, entries)
    return entries, problems


def _out_of_reach(name: str, recipe: Recipe, entries: Sequence[Entry]) -> list[Problem]:
    """What the options of a recorder's tap should have changed and could not, once for each module."""
    if untouched(recipe):
        return []
    problems: dict[str, Problem] = {}
    for entry in entries:
        kind = beyond(entry.value, recipe)
        if kind is not None:
            elements = reached(entry.value, recipe) if recipe.index is None else ()
            problems[entry.fqn] = out_of_reach(name, entry.fqn, kind, elements)
    return list(problems.values())
