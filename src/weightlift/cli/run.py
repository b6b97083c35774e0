"""``weightlift run script.py args…`` and ``weightlift run -m module args…``: a program with the drop-in in place.

It is run as ``python`` runs it: ``sys.argv``, ``__main__`` and the first entry of the search path are its own.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything after the script or module belongs to the program."""
    parser.usage = "weightlift run [-h] (SCRIPT | -m MODULE) [ARGUMENT ...]"
    parser.add_argument("-m", dest="module", action="store_true", help="run a module by its name, as python -m does")
    parser.add_argument("program", metavar="SCRIPT", help="a Python file, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="the program's own arguments")


def run(arguments: argparse.Namespace) -> int:
    """Install, then run the program; its exit code is this one's. Whatever it raises is raised."""
    from weightlift.integrations import install

    if not arguments.module and not os.path.exists(arguments.program):
        print(f"weightlift run: no such file: {arguments.program}", file=sys.stderr)
        return 2
    install()
    sys.argv[:] = [arguments.program, *arguments.arguments]
    if arguments.module:
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments.program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(arguments.program))
        runpy.run_path(arguments.program, run_name="__main__")
    return 0
