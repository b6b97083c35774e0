"""``weightlift``: inspect, plan, load, verify, run, demo, bench.

Exit codes: 0; 1 when a checkpoint is broken, does not fit or can't be read, or the output can't be written; 2 for a
wrong command line; 130 for Ctrl-C; 141 where whoever read the output has gone. With ``--json`` an error is also printed
as JSON, by whichever command.
A command is imported when it is run, so that ``--help`` costs none of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Sequence

from weightlift.cli.arguments import UsageError
from weightlift.cli.streams import any_character, complain, guarded
from weightlift.cli.wording import as_flags

_COMMANDS = {
    "inspect": "what a checkpoint holds: keys, shapes, dtypes, bytes",
    "plan": "what loading a checkpoint into a model would do, from headers alone",
    "load": "load a checkpoint into a model, and say what it took",
    "verify": "check every rule of the format, and the index against the shard files",
    "run": "run a Python program whose from_pretrained calls go through weightlift",
    "demo": "make a checkpoint, load it in four threads at once, check and time it",
    "bench": "time loading beside its peers, case by case, on this machine",
}

_PROGRAM = "run"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in words if not word.startswith("-")), None)
    if wanted == _PROGRAM:
        return _main(words, wanted)  # somebody else's program: what it raises is its own, and so are the streams
    name = f"weightlift {wanted}" if wanted in _COMMANDS else "weightlift"
    return guarded(lambda: _main(words, wanted), name, debug="--debug" in words)


def _main(words: list[str], wanted: str | None) -> int:
    parser = argparse.ArgumentParser(prog="weightlift", description="Puts checkpoint weights into PyTorch modules.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    if wanted != _PROGRAM:
        any_character()
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        if name == wanted:
            importlib.import_module(f"weightlift.cli.{name}").add_arguments(command)
    own, theirs = words, list[str]()
    if wanted == _PROGRAM:
        at = words.index(_PROGRAM) + 1
        own, theirs = importlib.import_module("weightlift.cli.run").split(words[at:])
        own = [*words[:at], *own]
    arguments = parser.parse_args(own)
    if arguments.version:
        from weightlift import __version__

        print(f"weightlift {__version__}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    if arguments.command == _PROGRAM:
        arguments.arguments = theirs
        return int(importlib.import_module("weightlift.cli.run").run(arguments))
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from weightlift.errors import WeightliftError

    try:
        command = importlib.import_module(f"weightlift.cli.{arguments.command}")
        code: int = command.run(arguments)
        return code
    except UsageError as error:
        return _failed(error, arguments, 2)
    except WeightliftError as error:
        return _failed(error, arguments, 1)
    except OSError:
        raise  # `guarded` knows what to do
    except Exception as error:  # of the model's own code, mostly: its hooks run when a load is planned
        return _failed(error, arguments, 1, f"{type(error).__name__}: {error} (--debug shows where)")


def _failed(error: Exception, arguments: argparse.Namespace, code: int, text: str | None = None) -> int:
    if arguments.debug:
        complain("".join(traceback.format_exception(error)).rstrip())
    else:
        complain(f"weightlift {arguments.command}: {as_flags(str(error)) if text is None else text}")
    if getattr(arguments, "json", False):
        from weightlift.cli.error_json import error_as_json

        print(json.dumps(error_as_json(error, text), indent=2))
    return code


if __name__ == "__main__":
    sys.exit(main())
