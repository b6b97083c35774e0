"""Commands whose output, or whose trace, can't be written: a message and an exit code, no traceback. And its words."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlift
from weightlift.cli.wording import as_flags

TIED = ("--model", "cli_models:Tied")
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")


def test_a_trace_in_no_folder(here, run):
    code, out, err = run("load", "ckpt", *TIED, "--trace", "none/trace.html")
    assert (code, out) == (2, "")
    assert err == "weightlift load: --trace: there is no folder none for trace.html; make it first\n"


@FULL
def test_a_trace_on_a_full_disk(here, run):
    code, out, err = run("load", "ckpt", *TIED, "--trace", "/dev/full", "--quiet")
    assert code == 0 and "loaded" in out
    assert "ckpt into Tied could not be written to /dev/full" in err and "Traceback" not in err


WORDS = {
    "inspect": ("inspect", "ckpt"),
    "inspect as JSON": ("inspect", "ckpt", "--json"),
    "plan": ("plan", "ckpt", *TIED),
    "plan as JSON": ("plan", "ckpt", *TIED, "--json"),
    "load": ("load", "ckpt", *TIED, "--quiet"),
    "verify": ("verify", "ckpt"),
    "version": ("--version",),
    "list of the benchmarks": ("bench", "--list"),
}
EVERY = pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
SOME = pytest.mark.parametrize("words", [WORDS["inspect"], WORDS["plan as JSON"], WORDS["list of the benchmarks"]])
BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}  # as it is where nobody asks for anything else


def command(words: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "weightlift.cli.main", *words]


@FULL
@EVERY
def test_a_full_disk_is_a_line_and_1(here: Path, words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(words), cwd=here, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
            env=BUFFERED,
        )  # fmt: skip
    assert done.returncode == 1
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@FULL
def test_debug_shows_the_traceback_of_a_full_disk(here: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(("inspect", "ckpt", "--debug")),
            cwd=here, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 1 and "Traceback" in done.stderr


@SOME
def test_a_reader_that_has_gone_is_quiet(here: Path, words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command(words), cwd=here, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        env=BUFFERED,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@FULL
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_that_nobody_can_read(here: Path, unbuffered: str) -> None:
    """argparse keeps what fails while it prints to itself, from Python 3.11 on; what is left in the buffer fails
    afterwards."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(("load", "--help")), cwd=here, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
            check=False, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    kept = unbuffered and sys.version_info >= (3, 11)
    assert (done.returncode, done.stderr.count("\n")) == ((0, 0) if kept else (1, 1)), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
@SOME
def test_an_output_that_never_was_is_quiet(here: Path, words: tuple[str, ...]) -> None:
    line = f"exec {shlex.join(command(words))} >&-"
    done = subprocess.run(["sh", "-c", line], cwd=here, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


# -- words ------------------------------------------------------------------------------------------------------------


def test_hints_name_the_flags(here, run):
    save_file({"embed.weight": torch.zeros(16, 9), "extra": torch.zeros(1)}, here / "other.safetensors")
    for words in (("load", "other.safetensors", *TIED), ("plan", "other.safetensors", *TIED)):
        code, out, err = run(*words)
        text = out + err
        assert code == 1
        for flag in ("--rename", "--no-strict", "--ignore-mismatched"):
            assert flag in text, flag
        for name in ("strict=", "key_mapping", "ignore_mismatched"):
            assert name not in text, name


def test_every_hint_of_a_load_has_words_for_the_command_line():
    """Whatever option a message of the stages names, the command line has a flag for it, or says that it has none."""
    package = Path(weightlift.__file__).parent
    told = 0
    for path in [file for stage in ("plan", "transfer", "deferred") for file in (package / stage).rglob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                parts = [part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
                for text in [part for part in parts if isinstance(part, str) and PYTHON.search(part)]:
                    told += 1
                    assert not PYTHON.search(as_flags(text)) or "takes Python" in as_flags(text), (path, text)
    assert told >= 5, "there were some"


PYTHON = re.compile(r"\b(strict|ignore_mismatched|copy|defer|key_mapping)=|\b(key_mapping|device_map)\b")


def test_a_prefix_is_told_with_the_flag_that_takes_it_off(here, run):
    names = ["embed.weight", *(f"layers.{number}.{name}" for number in range(3) for name in ("weight", "bias"))]
    save_file({f"module.{name}": torch.zeros(1) for name in names}, here / "ddp.safetensors")
    code, _, err = run("load", "ddp.safetensors", *TIED)
    assert code == 1 and r"pass --rename '^module\.' ''" in err
    assert "weightlift plan --json lists all" in err and ".problems" not in err
    given = r"""pass key_mapping={r"^a\.": "", '^"b': "c"}; and more"""
    assert as_flags(given) == r"""pass --rename '^a\.' '' --rename '^"b' c; and more"""


@pytest.mark.parametrize("command", ["load", "plan"])
def test_a_pattern_that_matches_nothing_is_told_once(here, run, command):
    save_file({"embed.weight": torch.zeros(16, 9)}, here / "other.safetensors")
    _, out, err = run(command, "other.safetensors", *TIED, "--rename", "^nowhere", "")
    assert (out + err).count("--rename['^nowhere'] matches no key of the checkpoint") == 1
