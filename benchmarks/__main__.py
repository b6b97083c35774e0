"""``python -m benchmarks [CASE …] [--list] [--rounds 5] [--scale 1.0] [--out FOLDER]``: all cases, or some."""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import cases, report
from benchmarks.harness import CEILING, OURS, Case, Result, run_case
from weightlift.cli.arguments import above_zero, positive
from weightlift.cli.streams import any_character, guarded


def main() -> int:
    """Run, print the table, write the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="weightlift beside its peers")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases.FILES)}; all when none is given")
    parser.add_argument("--list", action="store_true", help="name the cases and what each demands, and measure nothing")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--beside", metavar="NAMES", help="only these contenders (and us), separated by commas")
    parser.add_argument("--scale", type=above_zero, default=1.0, help="of the models' size; below 1 for a quick look")
    parser.add_argument("--out", type=Path, help="write results.json, results.md and results.svg there")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made (a few GB; removed again)")
    arguments = parser.parse_args()
    any_character()
    unknown = set(arguments.cases) - set(cases.FILES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    wanted = [cases.find(name) for name in arguments.cases or cases.FILES]
    peers = {name for case in wanted for name in case.contenders}
    unknown = set((arguments.beside or "").split(",")) - peers - {""}
    if unknown:
        parser.error(f"no such peer in these cases: {', '.join(sorted(unknown))}; there are {', '.join(sorted(peers))}")
    wanted = [_beside(case, arguments.beside) for case in wanted]
    if arguments.list:
        print("\n".join(f"{case.name:14} {case.title}: {case.target}" for case in wanted))
        return 0
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)  # now, and not after an hour
    results: list[Result] = []
    for case in wanted:
        result = _run(case, arguments.rounds, arguments.scale, arguments.folder)
        if result is None:
            continue
        results.append(result)
        text = _write(results, arguments.scale, arguments.out)  # after each: all of them can take an hour
    if results:
        print(text)
    return 0


def _write(results: list[Result], scale: float, folder: Path | None) -> str:
    """The table of what there is so far; also into files, with figures and chart, where a folder is given."""
    where, date = report.machine(scale), datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    text = report.as_markdown(results, where, date)
    if folder is not None:
        (folder / "results.md").write_text(text)
        (folder / "results.json").write_text(report.as_json(results, where, date))
        (folder / "results.svg").write_text(report.as_svg(results))
    return text


def _beside(case: Case, names: str | None) -> Case:
    """The case with fewer contenders: ours, the named ones, and the ceilings."""
    if names is None:
        return case
    kept = {
        name: ready
        for name, ready in case.contenders.items()
        if name.startswith((OURS, CEILING)) or name in names.split(",")
    }
    return replace(case, contenders=kept)


def _run(case: Case, rounds: int, scale: float, parent: Path | None) -> Result | None:
    if case.needs == "cuda" and not torch.cuda.is_available():
        print(f"{case.name}: left out, no CUDA device here")
        return None
    folder = Path(tempfile.mkdtemp(prefix="weightlift-bench-", dir=parent))
    try:
        case.prepare(folder, scale)
        with tqdm(total=rounds * len(case.contenders), desc=case.name, disable=None) as bar:

            def tell(text: str) -> None:
                bar.set_description(text)
                bar.update()

            return run_case(case, folder, rounds=rounds, tell=tell)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(guarded(main, "benchmarks"))
