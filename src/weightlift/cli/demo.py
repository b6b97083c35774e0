"""``weightlift demo``: a tied, sharded checkpoint, loaded by four threads at once, checked and timed."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.cli.arguments import UsageError, above_zero, positive

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from weightlift.cli.demo_measure import Memory
    from weightlift.cli.demo_model import Decoder

_FILES = 5
_TIMING_SECONDS = 15.0  # a slow machine does fewer rounds, but three
_Bump = Callable[[int], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint (default: the temporary folder)")
    parser.add_argument("--threads", type=positive, default=4, metavar="N", help="loads at once (default: 4)")
    parser.add_argument(
        "--rounds", type=positive, default=5, metavar="N", help="timed rounds, fewer on a slow machine (default: 5)"
    )
    parser.add_argument("--size-mb", type=above_zero, default=500.0, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Make, load, check, time, remove. 1 when a check fails."""
    from weightlift.cli.output import console

    with _folder(arguments.folder) as folder:
        return _Demo(console(), folder, arguments.size_mb, arguments.threads, arguments.rounds).run()


@contextmanager
def _folder(parent: Path | None) -> Iterator[Path]:
    """A new folder within ``parent``. Afterwards it is removed, and ``parent`` too if it was made here."""
    made = parent is not None and not parent.exists()
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="weightlift-demo-", dir=parent))
    except OSError as error:
        raise UsageError(f"--folder: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made and parent is not None and not any(parent.iterdir()):
            parent.rmdir()


class _Demo:
    """One run: every step prints what it did."""

    def __init__(self, out: Console, folder: Path, size_mb: float, threads: int, rounds: int) -> None:
        from weightlift.cli.demo_model import Config

        self.out = out
        self.folder = folder
        self.size_mb = size_mb
        self.config = Config.of_size(size_mb)
        self.threads = threads
        self.rounds = rounds
        self.failures = 0

    def run(self) -> int:
        import torch

        from weightlift.cli.demo_model import reference

        start = time.perf_counter()
        model = reference(self.config)
        tokens = torch.arange(16).view(1, -1) * 7 % self.config.vocabulary
        with torch.no_grad():
            expected = model(tokens)
        self._write(model)
        self._show_plan()
        self._load_in_threads(model, tokens, expected)
        del model, expected
        self._time()
        seconds = time.perf_counter() - start
        if self.failures:
            self.out.print(f"\n{self.failures} checks failed ({seconds:.0f} s)", style="bold red")
            return 1
        self.out.print(f"\nevery check passed; {self.folder} is removed ({seconds:.0f} s in all)", style="bold green")
        return 0

    def _build(self) -> Decoder:
        from weightlift.cli.demo_model import Decoder

        return Decoder(self.config)

    def _title(self, text: str) -> None:
        self.out.print(f"\n{text}", style="bold")

    def _check(self, what: str, wrong: int, of: int) -> None:
        self.failures += wrong > 0
        style = "red" if wrong else "green"
        self.out.print(f"  {'✗' if wrong else '✓'} {what}: {of - wrong:,} of {of:,} right", style=style)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _write(self, model: Decoder) -> None:
        from weightlift.cli.demo_model import write_checkpoint
        from weightlift.plan.report import human_bytes

        total = sum(parameter.nbytes for parameter in model.parameters())
        with self._progress("writing the checkpoint", total) as bump:
            files = write_checkpoint(model, self.folder, files=_FILES, progress=bump)
        count = sum(parameter.numel() for parameter in model.parameters())
        size = human_bytes(sum(file.stat().st_size for file in files))
        self.out.print(
            f"A decoder of {self.config.layers} layers, {count / 1e6:.1f} M parameters, float32, tied head; its"
            f" checkpoint: {size} in {len(files)} files and an index, without lm_head.weight",
            soft_wrap=True,
        )

    def _show_plan(self) -> None:
        import weightlift as wl
        from weightlift.cli.output import print_plan

        start = time.perf_counter()
        made = wl.plan(self._build, self.folder)
        milliseconds = (time.perf_counter() - start) * 1e3
        self._title(f"plan, from headers alone ({milliseconds:.0f} ms)")
        print_plan(self.out, str(made))

    def _load_in_threads(self, model: Decoder, tokens: torch.Tensor, expected: torch.Tensor) -> None:
        import torch

        import weightlift as wl

        together = threading.Barrier(self.threads)
        total = self.threads * sum(parameter.nbytes for parameter in model.parameters())

        def one(bump: _Bump) -> tuple[Decoder, float, torch.Tensor]:
            done = 0

            def told(now: int, _: int) -> None:
                nonlocal done
                bump(now - done)
                done = now

            together.wait()
            start = time.perf_counter()
            loaded = wl.load(self._build, self.folder, progress=told)
            seconds = time.perf_counter() - start
            with torch.no_grad():
                return loaded, seconds, loaded.eval()(tokens)

        with (
            self._progress(f"loading in {self.threads} threads", total) as bump,
            _Bystander() as bystander,
            ThreadPoolExecutor(self.threads) as pool,
        ):
            found = list(pool.map(one, [bump] * self.threads))
        slowest = max(seconds for _, seconds, _ in found)
        self._title(f"{self.threads} threads load it at once ({slowest * 1e3:.0f} ms until the last one has it)")
        models = [loaded for loaded, _, _ in found]
        tensors = [pair for loaded in models for pair in _pairs(loaded, model)]
        wrong = sum(not torch.equal(mine, theirs) for mine, theirs in tensors)
        self._check("weights and buffers bit-equal to what was saved", wrong, len(tensors))
        self._check("tensors with memory, none on meta", sum(mine.is_meta for mine, _ in tensors), len(tensors))
        untied = sum(loaded.lm_head.weight is not loaded.embed.weight for loaded in models)
        self._check("heads tied to the embedding", untied, len(models))
        wrong = sum(not torch.equal(output, expected) for _, _, output in found)
        self._check("outputs equal to the reference's, bit for bit", wrong, len(found))
        self._check("ordinary layers that a bystander thread built meanwhile", bystander.wrong, bystander.built)

    def _time(self) -> None:
        from weightlift.cli.demo_measure import memory_of, seconds_of, ways

        loads = ways(self.folder, self.config)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in loads}
        memory: dict[str, Memory | None] = {}
        with self._progress("timing", (self.rounds + 1) * len(loads), unit=False) as bump:
            start = time.perf_counter()
            for number in range(self.rounds):
                if number >= 3 and time.perf_counter() - start > _TIMING_SECONDS:
                    break
                for name, load in loads.items():
                    taken[name].append(seconds_of(load))
                    bump(1)
            for name in loads:
                memory[name] = memory_of(name, self.folder, self.size_mb)
                bump(1)
        rounds = len(next(iter(taken.values())))
        self._title(f"time, median of {rounds} alternating rounds, files in the page cache; memory that one load adds")
        self._print_measured(taken, memory)

    def _print_measured(self, taken: dict[str, list[tuple[float, float]]], memory: dict[str, Memory | None]) -> None:
        import torch

        from weightlift.cli.output import add, table
        from weightlift.plan.report import human_bytes

        shown = table(
            "", ">returns", ">every page read", ">ratio", ">lowest–highest", ">own memory", ">mapped", ">peak"
        )
        baseline = [seconds for _, seconds in next(iter(taken.values()))]
        for name, rounds in taken.items():
            ratios = sorted(theirs / mine for theirs, (_, mine) in zip(baseline, rounds, strict=True))
            held = memory[name]
            sizes = ["?"] * 3 if held is None else [
                human_bytes(size) for size in (held.own_bytes, held.mapped_bytes, held.peak_bytes)]  # fmt: skip
            add(shown, f"  {name}", f"{statistics.median(first for first, _ in rounds):.3f} s",
                f"{statistics.median(mine for _, mine in rounds):.3f} s", f"{statistics.median(ratios):.1f}×",
                f"{ratios[0]:.1f}–{ratios[-1]:.1f}×", *sizes)  # fmt: skip
        self.out.print(shown)
        busy = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        machine = f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}{busy}; torch {torch.__version__}"
        self.out.print(f"  measured on {machine}", style="dim")

    @contextmanager
    def _progress(self, what: str, total: int, *, unit: bool = True) -> Iterator[_Bump]:
        """A bar on a terminal's standard error that goes away at the end; elsewhere nothing."""
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

        columns: list[Any] = [TextColumn("{task.description}"), BarColumn()]
        columns.append(DownloadColumn() if unit else MofNCompleteColumn())
        err = Console(stderr=True)
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task(what, total=total)
            yield lambda step: bar.update(task, advance=step)


class _Bystander:
    """A thread that builds ordinary layers while others load, and looks whether they are ordinary."""

    def __init__(self) -> None:
        self.built = 0
        self.wrong = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bystander")

    def __enter__(self) -> _Bystander:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        import torch

        while not self._stop.is_set():
            weight = torch.nn.Linear(16, 16).weight
            ordinary = weight.device.type == "cpu" and weight.dtype == torch.float32 and bool(weight.any())
            self.built += 1
            self.wrong += not ordinary


def _pairs(loaded: Decoder, saved: Decoder) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    mine = dict(itertools.chain(loaded.named_parameters(remove_duplicate=False), loaded.named_buffers()))
    for name, theirs in itertools.chain(saved.named_parameters(remove_duplicate=False), saved.named_buffers()):
        yield mine[name], theirs
