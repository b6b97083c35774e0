"""The whole list of model types, or a part of it, with a time limit for each and a count at the end.

``python -m tests.parity.survey [--missing] [--first N] [--last N] [--only NAME …] [--seconds 300] [--out FILE]``: one
line of JSON for each model type, written as it is done, so that a run that was stopped can be taken up where it was;
then the figures. Each class is loaded whole; with ``--missing`` the first of each type that can be made tiny is loaded
without each group of its keys in turn, and with a misfit.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.parity import tiny
from tests.parity.compare import FellBack
from tests.parity.missing import Seen, misfits, prepared
from tests.parity.test_every_model import check
from tests.parity.together import each_in_turn


@dataclass
class Found:
    """What came of dropping a model type's keys, so far: kept also where the time is up."""

    differences: list[str] = field(default_factory=list)
    count: Counter[str] = field(default_factory=Counter)  # the groups of keys that were dropped, the loads that did so
    seen: Seen = field(default_factory=Seen)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.count,
            "uninitialised": sorted(self.seen.uninitialised),
            "overwritten": sorted(self.seen.overwritten),
        }


class TooLong(BaseException):
    """A model type took longer than it was given."""


Check = Callable[[str, type, Path], list[str]]


def survey(model_type: str, seconds: int, missing: Found | None) -> dict[str, Any]:
    """What became of every class of a model type: "equal", "skipped: why", "not native: why", "differs: what"."""
    classes: dict[str, str] = {}
    run = check if missing is None else functools.partial(_without, missing)
    signal.alarm(seconds)
    try:
        for cls in tiny.heads_first(model_type):
            classes[cls.__name__] = "too long"
            with tempfile.TemporaryDirectory() as folder:
                classes[cls.__name__] = _outcome(run, model_type, cls, Path(folder))
            if missing is not None and not classes[cls.__name__].startswith("skipped"):
                break
    except TooLong:
        if missing is not None and missing.differences:
            classes[cls.__name__] = f"differs, and too long: {missing.differences}"[:2000]
    finally:
        signal.alarm(0)
    return classes


def _without(into: Found, model_type: str, cls: type, folder: Path) -> list[str]:
    try:
        model, checkpoint = prepared(cls, model_type, folder)
    except Exception as error:
        pytest.skip(f"no tiny {cls.__name__}: {error!r:.150}")
    for groups, found in each_in_turn(cls, model, checkpoint, into.seen):
        into.differences.extend(found)
        into.count.update(groups=groups, loads=1)
    del model
    return into.differences + misfits(cls, checkpoint)


def _outcome(run: Check, model_type: str, cls: type, folder: Path) -> str:
    try:
        found = run(model_type, cls, folder)
    except pytest.skip.Exception as reason:
        return f"skipped: {reason}"
    except FellBack as reason:
        return f"not native: {reason}"
    except (Exception, pytest.fail.Exception) as error:
        return f"fails: {error!r:.400}"
    return f"differs: {found}"[:2000] if found else "equal"


def verdict(classes: dict[str, str]) -> str:
    """The worst of a model type's classes; "skipped" only when no class could be tried."""
    kinds = {re.split("[:,]", value)[0] for value in classes.values()}
    for kind in ("fails", "differs", "not native", "too long", "equal"):
        if kind in kinds:
            return kind
    return "skipped" if kinds else "no class"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--missing", action="store_true", help="drop each group of keys in turn")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=len(tiny.MODEL_TYPES))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seconds", type=int, default=300, help="for one model type")
    parser.add_argument("--out", type=Path, default=Path("survey.jsonl"))
    options = parser.parse_args()

    def ring(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, ring)
    tiny.quiet()
    done = {}
    if options.out.exists():
        done = {item["model_type"]: item for item in map(json.loads, options.out.read_text().splitlines())}
    for model_type in options.only or tiny.MODEL_TYPES[options.first : options.last]:
        if model_type in done:
            continue
        start = time.monotonic()
        missing = Found() if options.missing else None
        classes = survey(model_type, options.seconds, missing)
        took = round(time.monotonic() - start, 1)
        done[model_type] = {"model_type": model_type, "seconds": took, "classes": classes}
        if missing is not None:
            done[model_type].update(missing.as_json())
        with options.out.open("a") as out:
            out.write(json.dumps(done[model_type]) + "\n")
    print(json.dumps(Counter(verdict(item["classes"]) for item in done.values())))
    every = [value.split(":")[0] for item in done.values() for value in item["classes"].values()]
    print("classes", json.dumps(Counter(every)))
    if options.missing:
        print(f"{sum(item.get('groups', 0) for item in done.values())} groups")
        for what in ("uninitialised", "overwritten"):
            names = {model_type: item[what] for model_type, item in done.items() if item.get(what)}
            print(f"{what} by Transformers: {json.dumps(names)}")


if __name__ == "__main__":
    main()
