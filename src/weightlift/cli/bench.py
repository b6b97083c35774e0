"""``weightlift bench``: the benchmark suite, which lies beside the source and not in the installed package."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import weightlift
from weightlift.cli.arguments import UsageError, above_zero, positive

_TIDY_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m benchmarks``."""
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which cases; all when none is given")
    parser.add_argument("--list", action="store_true", help="name the cases and what each demands, and measure nothing")
    parser.add_argument("--rounds", type=positive, default=5, help="how often each contender of a case runs (5)")
    parser.add_argument("--beside", metavar="NAMES", help="only these peers, separated by commas")
    parser.add_argument("--scale", type=above_zero, default=1.0, help="of the models' size; below 1 for a quick look")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results.json, .md and .svg there")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made (a few GB; removed again)")


def run(arguments: argparse.Namespace) -> int:
    """Run the suite in a process of its own; its exit code is this one's."""
    root = Path(weightlift.__file__).parents[2]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise UsageError("the benchmarks are part of the source, not of the installed package: run it in a clone")
    words = [*arguments.cases, "--rounds", str(arguments.rounds), "--scale", str(arguments.scale)]
    words += ["--list"] * arguments.list
    words += [] if arguments.beside is None else ["--beside", arguments.beside]
    for name in ("out", "folder"):
        path: Path | None = getattr(arguments, name)
        words += [] if path is None else [f"--{name}", str(path.absolute())]
    suite = subprocess.Popen([sys.executable, "-m", "benchmarks", *words], cwd=root)
    try:
        return suite.wait()
    except KeyboardInterrupt:
        # A terminal has told the suite as well, which now removes the gigabytes that it made. `subprocess.run` would
        # kill it at once.
        try:
            return suite.wait(_TIDY_SECONDS)
        except subprocess.TimeoutExpired:
            suite.send_signal(signal.SIGINT)
            return suite.wait()
