"""``weightlift load``: load a checkpoint into a model, and say what it took."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from weightlift.cli.arguments import add_checkpoint, add_model, load_options, positive, source
from weightlift.visible import visible

if TYPE_CHECKING:
    from weightlift import LoadPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_checkpoint(parser)
    add_model(parser)
    parser.add_argument("--copy", action="store_true", help="give every tensor memory of its own; map nothing")
    parser.add_argument("--workers", type=positive, metavar="N", help="threads that read (default: 8)")
    parser.add_argument("--memory-budget", type=positive, metavar="BYTES", help="bound on what is in flight")
    parser.add_argument("--trace", metavar="FILE", help="write a timeline: a page (.html) or Chrome trace events")
    parser.add_argument(
        "--verify", action="store_true", help="also hash every file, and compare with what is written down"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print the report and the times, or the error, as JSON")


@dataclass(frozen=True, slots=True)
class _Seconds:
    """What it took: building and planning, then loading."""

    plan: float
    load: float


def run(arguments: argparse.Namespace) -> int:
    """Load, and print the report and the times."""
    import weightlift as wl
    from weightlift.cli.model import builder
    from weightlift.cli.notes import heard, tell

    options = load_options(
        arguments,
        copy=arguments.copy,
        workers=arguments.workers,
        memory_budget_bytes=arguments.memory_budget,
        progress=False if arguments.quiet else None,
        trace=arguments.trace,
        verify=arguments.verify,
    )
    build = builder(arguments.model)
    start = time.perf_counter()
    with heard("load") as notes:
        made = wl.plan(build, source(arguments), **options)
        planned = time.perf_counter()
        made.execute()
    seconds = _Seconds(planned - start, time.perf_counter() - planned)
    report, mapped = made.report, 0 if arguments.copy else _mappable_bytes(made)
    tell("load", [note for note in notes if not (report.warning() and note.endswith(f": {report.warning()}"))])
    if arguments.json:
        print(json.dumps(_as_json(made, seconds, mapped), indent=2))
    else:
        _print(made, seconds, mapped)
    return 0


def _as_json(made: LoadPlan, seconds: _Seconds, mapped: int) -> dict[str, Any]:
    return {
        "module": made.decisions.module,
        "source": made.decisions.source,
        **made.report.as_json(),
        "mappable_bytes": mapped,
        "seconds": asdict(seconds),
    }


def _print(made: LoadPlan, seconds: _Seconds, mapped: int) -> None:
    from weightlift.cli.output import add, console, table
    from weightlift.plan.report import human_bytes

    report = made.report
    out = console()
    out.print(visible(f"{made.decisions.source} into {made.decisions.module}"), soft_wrap=True)
    out.print(str(report), soft_wrap=True)
    times = table("step", ">seconds", "")
    add(times, "build and plan", f"{seconds.plan:.3f}", "headers only")
    rate = human_bytes(report.read_bytes / max(seconds.load, 1e-9))
    add(times, "load", f"{seconds.load:.3f}", f"{human_bytes(report.read_bytes)}, {rate}/s")
    add(times, "together", f"{seconds.plan + seconds.load:.3f}", "")
    out.print()
    out.print(times)
    if mapped:
        text = "can be mapped: such pages are read when they are first used. --copy reads everything now."
        out.print(f"{human_bytes(mapped)} of it {text}", style="dim", soft_wrap=True)


def _mappable_bytes(made: LoadPlan) -> int:
    """Bytes of what stays on the CPU in the dtype that the file has."""
    from weightlift.plan.records import Action

    return sum(
        row.nbytes
        for row in made.decisions.rows
        if row.action is Action.LOADED
        and not row.cast
        and not row.in_place
        and row.device == "cpu"
        and row.offer is not None
        and row.offer.entry.file is not None
    )
