"""Fuzz a parser for as many inputs as asked: ``python tests/corrupt/fuzz.py TARGET --runs 1000000``.

With atheris installed the search is guided by coverage; ``--plain`` (or no atheris) mutates the seeds at random.
Prints the number of inputs, how many were accepted, and every distinct error; writes an input that breaks a promise to
``fuzz-failure`` and stops. ``--keep FOLDER`` saves one small input for each distinct error.
"""

from __future__ import annotations

import argparse
import collections
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

_TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"-", b"1e999", b"NaN", b"null", b"true", b"0", b"18446744073709551616",
    b"9223372036854775808", b'"shape"', b'"dtype"', b'"data_offsets"', b'"__metadata__"', b'"F32"', b'"F4"', b"\\ud800",
    b"../", b"/etc/passwd", b"\\", b"\0", b"\xff", b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\x80\2",
    b"cos\nsystem\n", b"c__builtin__\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"R.", b"(", b"t", b"Q", b"\x95",
    b"ccollections\nOrderedDict\n", b"\x8a\xff", b"\x8b\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\xff" * 8, b"model",
]  # fmt: skip


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A few random edits."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(made) + 1)
        edit = rng.randrange(7)
        if edit == 0 and made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        elif edit == 1 and made:
            made[at % len(made)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif edit == 2:
            made[at:at] = rng.choice(_TOKENS)
        elif edit == 3:
            del made[at : at + rng.choice((1, 2, 4, 16, 100))]
        elif edit == 4:
            start = rng.randrange(len(made) + 1)
            made[at:at] = made[start : start + rng.choice((1, 4, 16, 64))]
        elif edit == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            made[at : at + rng.randrange(20)] = other[start : start + rng.randrange(60)]
        else:
            token = rng.choice(_TOKENS)
            made[at : at + len(token)] = token
    return bytes(made[:20_000])


class Runner:
    """Counts, and remembers the smallest input of every distinct error."""

    def __init__(self, name: str, folder: Path) -> None:
        from fuzz_targets import Target, Watch

        self.name = name
        self.target = Target(name, folder, Watch())
        self.count = 0
        self.accepted = 0
        self.kept: dict[str, bytes] = {}
        self.times = collections.Counter[str]()

    def one(self, data: bytes) -> bool:
        """Check one input; True when it showed something new."""
        from fuzz_targets import normalised, unpack

        self.count += 1
        file = unpack(self.name, data)
        try:
            text = self.target.check(file)
        except BaseException:
            Path("fuzz-failure").write_bytes(file)
            raise
        self.accepted += text == "accepted"
        mark = normalised(text.partition(";")[0])
        new = mark not in self.kept
        self.times[mark] += 1
        if new or len(file) < len(self.kept[mark]):
            self.kept[mark] = file
        return new

    def report(self, started: float) -> None:
        seconds = time.monotonic() - started
        print(
            f"{self.name}: {self.count:,} inputs in {seconds:.0f} s, {self.accepted:,} accepted, "
            f"{len(self.kept)} distinct outcomes",
            flush=True,
        )


def plain(runner: Runner, runs: int, seed: int) -> None:
    """Random edits of the seeds, and of every input that showed a new error."""
    from fuzz_targets import packed_seeds

    rng = random.Random(seed)
    pool = packed_seeds(runner.name)
    for data in pool:
        runner.one(data)
    while runner.count < runs:
        data = mutate(rng.choice(pool), rng, pool)
        if runner.one(data):
            pool.append(data)


def guided(runner: Runner, runs: int, seed: int, started: float, keep: Path | None) -> None:
    """Coverage decides what is mutated further. atheris ends the process, so the report comes with the last input."""
    import atheris
    from fuzz_targets import packed_seeds

    corpus = Path(tempfile.mkdtemp())
    for number, data in enumerate(packed_seeds(runner.name)):
        (corpus / str(number)).write_bytes(data)
    rng = random.Random(seed)
    others = packed_seeds(runner.name)

    def one(data: bytes) -> None:
        runner.one(data)
        if runner.count % 50_000 == 0 or runner.count == runs:
            runner.report(started)
        if runner.count == runs:
            _keep(runner, keep)

    def mutator(data: bytes, size: int, _: int) -> bytes:
        return atheris.Mutate(data, size) if rng.random() < 0.5 else mutate(data, rng, others)[:size]

    arguments = [sys.argv[0], f"-runs={runs}", f"-seed={seed}", "-max_len=8000", "-timeout=20", "-rss_limit_mb=4000"]
    atheris.Setup([*arguments, "-verbosity=0", str(corpus)], one, custom_mutator=mutator)
    atheris.Fuzz()


def _keep(runner: Runner, folder: Path | None) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, (_, data) in enumerate(sorted(runner.kept.items())):
        (folder / f"{number:03}").write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["safetensors", "index", "zip", "legacy", "dduf", "dcp", "distcp"])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError:
        arguments.plain = True
    if not arguments.plain:
        import torch  # noqa: F401  (not to be instrumented)

        with atheris.instrument_imports(include=["weightlift.checkpoint"]):
            import weightlift.checkpoint  # noqa: F401
    # A number from the file that is allocated must not fit.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), resource.RLIM_INFINITY))
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "checkpoint"
    folder.mkdir()
    runner = Runner(arguments.target, folder)
    started = time.monotonic()
    if arguments.plain:
        plain(runner, arguments.runs, arguments.seed)
        runner.report(started)
        _keep(runner, arguments.keep)
    else:
        guided(runner, arguments.runs, arguments.seed, started, arguments.keep)


if __name__ == "__main__":
    main()
