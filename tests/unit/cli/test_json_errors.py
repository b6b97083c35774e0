"""``--json`` prints one JSON object whatever happens; the exit code and the text on standard error stay."""

from __future__ import annotations

import json
import sys

import pytest
from safetensors.torch import save_file

import weightlift as wl

TIED = ("--model", "cli_models:Tied")
FIELDS = {"what", "key", "fqn", "file", "range", "expected", "found", "hint"}
COMMANDS = {
    "inspect": ("inspect", "ckpt"),
    "load": ("load", "ckpt", *TIED),
    "plan": ("plan", "ckpt", *TIED),
    "plan without a model": ("plan", "ckpt", "--mesh", "fsdp=2"),
}


def cut(here):
    file = here / "ckpt" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    return file


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_broken_checkpoint(here, run, words):
    file = cut(here)
    code, out, err = run(*words, "--json")
    error = json.loads(out)["error"]
    assert (code, "", err) == run(*words)
    assert error["kind"] == "CheckpointError" and error["summary"].startswith("cannot open the checkpoint")
    with pytest.raises(wl.CheckpointError) as raised:
        wl.open_checkpoint(here / "ckpt")
    for found, problem in zip(error["problems"], raised.value.problems, strict=True):
        assert set(found) == FIELDS
        assert found["file"] == str(file) and found["what"] == problem.what and found["key"] == problem.key
        assert found["range"] == (None if problem.start is None else [problem.start, problem.end])
    assert any(problem["range"] and problem["key"] for problem in error["problems"])


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_no_checkpoint(here, run, words):
    code, out, err = run(words[0], "nothing", *words[2:], "--json")
    error = json.loads(out)["error"]
    assert code == 1 and err.startswith(f"weightlift {words[0]}: ")
    assert error["kind"] == "CheckpointNotFound" and error["problems"][0]["file"] == "nothing"


def test_what_is_no_error_of_a_checkpoint(here, run):
    code, out, err = run("plan", "ckpt", "--model", "cli_models:nowhere", "--json")
    error = json.loads(out)["error"]
    assert code == 2 and error["problems"] == []
    assert error["summary"] in err and "has no nowhere" in error["summary"]
    code, out, err = run("plan", "ckpt", "--model", "cli_models:Complains", "--json")
    error = json.loads(out)["error"]
    assert code == 1 and error["kind"] == "ValueError" and "the hook says no" in error["summary"] in err


def test_a_name_is_told_exactly(here, run):
    (here / "odd").mkdir()
    file = here / "odd" / "a\u202eb.safetensors"
    save_file({}, file)
    file.write_bytes(b"\x01")
    _, out, _ = run("inspect", str(file), "--json")
    assert out.isascii() and json.loads(out)["error"]["problems"][0]["file"] == str(file)


def test_a_traceback_leaves_the_json_alone(here, run):
    cut(here)
    code, out, err = run("--debug", "inspect", "ckpt", "--json")
    assert code == 1 and "Traceback" in err and json.loads(out)["error"]["problems"]


def test_verify_lists_the_same_objects(here, run):
    cut(here)
    problems = json.loads(run("verify", "ckpt", "--json")[1])["problems"]
    assert problems == json.loads(run("inspect", "ckpt", "--json")[1])["error"]["problems"]


def test_a_load_that_does_not_fit(here, run):
    code, out, err = run("load", "ckpt", "--model", "cli_models:wide", "--json")
    error = json.loads(out)["error"]
    assert (code, "", err) == run("load", "ckpt", "--model", "cli_models:wide")
    assert code == 1 and error["kind"] == "PlanError"
    made = wl.plan(lambda: sys.modules["cli_models"].wide(), here / "ckpt")
    assert [problem["fqn"] for problem in error["problems"]] == [problem.fqn for problem in made.problems]
    assert all("--ignore-mismatched" in problem["hint"] for problem in error["problems"])
