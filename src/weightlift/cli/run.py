"""``weightlift run script.py args…`` and ``weightlift run -m module args…``: a program with the drop-in in place.

It is run as ``python`` runs it (`weightlift.cli.program`), and nothing that it may want to set up first has been
imported: the drop-in imports neither Transformers nor torch before the program does.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from weightlift.cli.streams import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything after the script or module belongs to the program, which `split` sees to."""
    parser.usage = "weightlift run [-h] (SCRIPT | -m MODULE | -) [ARGUMENT ...]"
    parser.add_argument("-m", dest="module", metavar="MODULE", help="run a module by its name, as python -m does")
    parser.add_argument(
        "program", nargs="?", metavar="SCRIPT", help="a Python file, a folder or zip with a __main__.py, - for stdin"
    )
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="the program's own arguments")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are ours, and those of the program, as ``python`` tells them apart: what follows the first word
    that is no option, or the value of ``-m``, is the program's, ``--`` and our own options among it.
    """
    end = len(words)
    for index, word in enumerate(words):
        if word.startswith("-m"):
            end = index + (2 if word == "-m" else 1)
        elif word == "--":
            end = index + 2
        elif word != "-" and word.startswith("-"):
            continue
        else:
            end = index + 1
        break
    return list(words[:end]), list(words[end:])


def run(arguments: argparse.Namespace) -> int:
    """Install, then run the program; its exit code is this one's. Whatever it raises is raised."""
    from weightlift.cli import program
    from weightlift.integrations import install

    if arguments.module is None and arguments.program is None:
        complain("weightlift run: expected a script, -m and a module, or - for stdin")
        return 2
    if arguments.module is None and arguments.program != "-" and not os.path.exists(arguments.program):
        complain(f"weightlift run: no such file: {arguments.program}")
        return 2
    install()
    try:
        program.run(arguments.program, arguments.module, arguments.arguments)
    except program.CannotOpen as error:
        complain(f"weightlift run: can't open {arguments.program}: {error}")
        return 2
    return 0
