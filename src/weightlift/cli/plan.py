"""``weightlift plan``: what a load would do, and whether it would be refused."""

from __future__ import annotations

import argparse
import sys

from weightlift.cli.arguments import add_checkpoint, add_model, load_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_checkpoint(parser)
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. 1 when it has problems, which the plan ends with."""
    import weightlift as wl
    from weightlift.cli.model import builder
    from weightlift.cli.output import console, print_plan

    made = wl.plan(builder(arguments.model), arguments.path, **load_options(arguments))
    if arguments.json:
        print(made.to_json(indent=2))
    else:
        print_plan(console(), str(made))
    if not made.problems:
        return 0
    count = len(made.problems)
    print(f"weightlift plan: it does not fit, {count} problem{'s' * (count != 1)}", file=sys.stderr)
    return 1
