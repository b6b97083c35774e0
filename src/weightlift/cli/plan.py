"""``weightlift plan``: what a load would do, on one rank or on many, and whether it would be refused."""

from __future__ import annotations

import argparse
import json

from weightlift.cli.arguments import (
    UsageError,
    add_checkpoint,
    add_model,
    load_options,
    mesh,
    opened,
    refuse_without_model,
    source,
)
from weightlift.cli.streams import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_checkpoint(parser)
    add_model(parser, required=False)
    parser.add_argument(
        "--mesh",
        type=mesh,
        metavar="NAME=SIZE,…",
        help="also what every rank of such a mesh reads and holds, as in fsdp=1024 or fsdp=128,tp=8; from the headers"
        " alone, so --model can be left out. Axes: fsdp, tp, ep, dp",
    )
    parser.add_argument("--json", action="store_true", help="print the plan, or the error, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. 1 when it has problems, which the plan ends with."""
    _require_mesh(arguments)
    if arguments.model is None:
        return _without_model(arguments)
    import weightlift as wl
    from weightlift.cli.model import builder
    from weightlift.cli.notes import heard, tell
    from weightlift.cli.output import console, print_plan
    from weightlift.cli.wording import as_flags

    with heard("plan") as notes:
        options = load_options(arguments)
        made = wl.plan(builder(arguments.model), source(arguments), mesh_shape=arguments.mesh, **options)
    tell("plan", notes)
    if arguments.json:
        print(made.to_json(indent=2))
    else:
        print_plan(console(), as_flags(str(made)))
    if not made.problems:
        return 0
    count = len(made.problems)
    complain(f"weightlift plan: it does not fit, {count} problem{'s' * (count != 1)}")
    return 1


def _without_model(arguments: argparse.Namespace) -> int:
    """The checkpoint's own tensors on a mesh."""
    from weightlift.distributed.paper import on_mesh_alone

    refuse_without_model(arguments)
    report = on_mesh_alone(opened(arguments), arguments.mesh)
    print(json.dumps(report.as_json(), indent=2) if arguments.json else report)
    return 0


def _require_mesh(arguments: argparse.Namespace) -> None:
    """Raises UsageError for a mesh that can't be, and for none where there is no model either."""
    if arguments.mesh is None:
        if arguments.model is None:
            raise UsageError("give --model module:callable, or --mesh for a checkpoint by itself")
        return
    from weightlift.distributed.placing import Mesh, placer

    try:
        placer(Mesh.of(arguments.mesh), None, named=True)
    except ValueError as error:
        raise UsageError(f"--mesh: {error}") from error
