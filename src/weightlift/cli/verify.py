"""``weightlift verify``: is this checkpoint what its format says?"""

from __future__ import annotations

import argparse
import json

from weightlift.cli.arguments import add_within
from weightlift.cli.streams import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("path", metavar="PATH", help="a file, an index, a folder, or the id of a cached hub repository")
    parser.add_argument(
        "--hash", action="store_true", help="read every byte as well, and compare with the hashes that are written down"
    )
    add_within(parser)
    parser.add_argument("--json", action="store_true", help="print the problems as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Say that all is well, or every reason why it is not (1)."""
    import weightlift as wl
    from weightlift.checkpoint import verify
    from weightlift.cli.error_json import problem_as_json
    from weightlift.cli.output import console
    from weightlift.cli.wording import as_flags
    from weightlift.plan.report import human_bytes

    problems = verify(arguments.path, content=arguments.hash, within=arguments.within)
    if arguments.json:
        listed = [problem_as_json(problem) for problem in problems]
        print(json.dumps({"path": arguments.path, "valid": not problems, "problems": listed}, indent=2))
    elif problems:
        for problem in problems:
            print(f"- {as_flags(str(problem))}")
    else:
        found = wl.open_checkpoint(arguments.path, local_files_only=True, within=arguments.within)
        files = f"{len(found.files)} file{'s' * (len(found.files) != 1)}"
        hashed = ", content as hashed" if arguments.hash else ""
        size = human_bytes(found.total_bytes)
        console().print(f"valid: {len(found)} tensors, {size} in {files}{hashed}", style="green")
    if not problems:
        return 0
    count = len(problems)
    complain(f"weightlift verify: {arguments.path}: {count} problem{'s' * (count != 1)}")
    return 1
