"""inspect, plan, load, verify: what they print, and their exit codes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks import cases as benchmark_cases
from safetensors.torch import save_file

import weightlift
from weightlift.cli import main as cli_main

TIED = ("--model", "cli_models:Tied")


def child(*words: str, cwd: Path, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weightlift.cli.main", *words]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=120, check=False, **more)  # type: ignore[call-overload, no-any-return]


def test_version_and_help(run, capsys):
    assert run("--version") == (0, f"weightlift {weightlift.__version__}\n", "")
    assert run()[0] == 2
    for words in (["--help"], *([name, "--help"] for name in cli_main._COMMANDS)):
        with pytest.raises(SystemExit) as left:
            cli_main.main(words)
        assert left.value.code == 0
        assert "usage: weightlift" in capsys.readouterr().out


def test_a_command_imports_no_rich_for_help(here):
    code = "import sys; from weightlift.cli.main import main\ntry: main(['plan', '-h'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert not any(name.split('.')[0] == 'rich' for name in sys.modules)"],
        cwd=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_unknown_command_and_missing_arguments(run, capsys):
    for words in (["lift"], ["inspect"], ["load", "x"], ["inspect", "x", "--depth", "0"]):
        with pytest.raises(SystemExit) as left:
            cli_main.main(words)
        assert left.value.code == 2
        assert "usage:" in capsys.readouterr().err


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_prints_files_prefixes_and_folded_keys(here, run):
    code, out, err = run("inspect", "ckpt")
    assert (code, err) == (0, "")
    assert "7 tensors, 1.4 kB" in out
    assert "\n  metadata format: pt\n" in out
    assert re.search(r"model-00002-of-00002.safetensors +safetensors +6 +864 B", out)
    assert re.search(r"embed +1 +128 +512 B +float32", out)
    assert re.search(r"layers\.\{0…2\}\.weight +×3 +8×8 +float32 +768 B", out)


def test_inspect_depth_and_all(here, run):
    _, out, _ = run("inspect", "ckpt", "--depth", "2", "--all")
    assert re.search(r"layers\.1 +2 +72 +288 B", out)
    assert re.search(r"layers\.1\.weight +8×8", out)
    assert "{" not in out


def test_inspect_json(here, run):
    code, out, _ = run("inspect", "ckpt", "--json")
    found = json.loads(out)
    assert code == 0
    entry = next(item for item in found["tensors"] if item["key"] == "layers.2.bias")
    checkpoint = weightlift.open_checkpoint(here / "ckpt")["layers.2.bias"]
    assert entry == {
        "key": "layers.2.bias", "shape": [8], "dtype": "float32", "bytes": 32,
        "file": str(here / "ckpt" / "model-00002-of-00002.safetensors"),
        "range": [checkpoint.start, checkpoint.end],
    }  # fmt: skip
    assert found["total_bytes"] == 1376
    assert [row["prefix"] for row in found["prefixes"]] == ["layers", "embed"]
    assert [row["tensors"] for row in found["files"]] == [1, 6]


def test_inspect_takes_keys_for_what_they_are(here, run):
    """Brackets are no markup; scalars and empty tensors have shapes."""
    half = torch.zeros(2, dtype=torch.bfloat16)
    tensors = {"[red]x[/red]": torch.tensor(1.0), "empty": torch.zeros(0, 3), "half": half}
    save_file(tensors, here / "odd.safetensors")
    _, out, _ = run("inspect", "odd.safetensors")
    assert "[red]x[/red]" in out
    assert "scalar" in out
    assert "0×3" in out
    assert "bfloat16" in out


@pytest.mark.parametrize("words", [("inspect",), ("inspect", "--all"), ("plan", *TIED), ("load", *TIED, "--no-strict")])
def test_nothing_in_a_key_is_obeyed_by_the_terminal(here, run, words):
    """Neither escape sequences, nor ends of lines that would make up another line, nor marks of direction."""
    (here / "odd").mkdir()
    names = ("a\x1b[2Jb", "c\nloaded  head.weight", "d\rhidden", "e\u202eyek", "f\u2028g", "ключ ok")
    tensors = {name: torch.zeros(1) for name in names}
    save_file(tensors, here / "odd" / "model.safetensors", metadata={"format": "pt", "by": "\x1b]0;x\x07\nz"})
    _, out, err = run(words[0], "odd", *words[1:])
    text = out + err
    for shown in ("a\\x1b[2Jb", "c\\nloaded  head.weight", "d\\rhidden", "e\\u202eyek", "f\\u2028g", "ключ ok"):
        assert shown in text, shown
    assert all(line.isprintable() for line in text.split("\n"))


def test_inspect_torch_file_with_other_values(here, run):
    torch.save({"weight": torch.ones(2), "epoch": 3}, here / "model.pt")
    code, out, _ = run("inspect", "model.pt")
    assert code == 0
    assert "not tensors: epoch" in out


# -- plan -------------------------------------------------------------------------------------------------------------


def test_plan_prints_the_plan(here, run):
    code, out, err = run("plan", "ckpt", *TIED)
    assert (code, err) == (0, "")
    assert re.search(r"^loaded +embed\.weight +16×8 +float32 +model-00001", out, re.M)
    assert re.search(r"^tied +head\.weight .*= embed\.weight", out, re.M)


def test_plan_that_does_not_fit_is_1_with_every_reason(here, run):
    code, out, err = run("plan", "ckpt", "--model", "cli_models:wide")
    assert code == 1
    for name in ("embed.weight", "layers.{0…2}.weight ×3", "layers.{0…2}.bias ×3"):
        assert f"{name}: the shapes differ" in out
    assert re.fullmatch(r"weightlift plan: it does not fit, \d+ problems\n", err)
    assert run("plan", "ckpt", "--model", "cli_models:wide", "--ignore-mismatched", "--no-strict")[0] == 0


def test_plan_options_reach_the_plan(here, run):
    _, out, _ = run("plan", "ckpt", *TIED, "--dtype", "torch.bfloat16", "--json")
    assert {row["dtype"] for row in json.loads(out)["tensors"]} == {"bfloat16"}
    code, out, _ = run("plan", "ckpt", *TIED, "--rename", r"^layers\.0\.", "other.")
    assert code == 1
    assert "layers.0.weight: the parameter is missing" in out
    assert run("plan", "ckpt", *TIED, "--rename", r"^layers\.0\.", "other.", "--no-strict")[0] == 0
    assert run("plan", "ckpt", *TIED, "--no-defer")[0] == 0


def test_plan_json(here, run):
    code, out, _ = run("plan", "ckpt", "--model", "cli_models:wide", "--json")
    found = json.loads(out)
    assert code == 1
    assert len(found["problems"]) >= 7
    assert found["mismatched_keys"][0] == {"fqn": "embed.weight", "found": [16, 8], "expected": [16, 12]}


@pytest.mark.parametrize("model", [TIED, []], ids=["model", "headers alone"])
def test_plan_on_a_mesh(here, run, model):
    code, out, err = run("plan", "ckpt", *model, "--mesh", "fsdp=1024")
    assert (code, err) == (0, "")
    assert "mesh fsdp=1024: 1,024 ranks" in out
    for row in ("memory", "read", "requests", "files"):
        assert re.search(rf"^{row} .*\d", out, re.M)
    assert "1.00×" in out
    code, out, _ = run("plan", "ckpt", *model, "--mesh", "fsdp=2,tp=2", "--json")
    found = json.loads(out)
    found = found["mesh"] if model else found
    assert code == 0
    assert found["mesh"] == {"fsdp": 2, "tp": 2}
    assert [rank["coordinate"] for rank in found["ranks"]] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert sum(rank["read_bytes"] for rank in found["ranks"]) == found["read_bytes"] > 0


def test_plan_on_a_mesh_that_cannot_be_is_2(here, run):
    for mesh in ("fsdp", "fsdp=0", "sideways=2"):
        try:
            code = run("plan", "ckpt", "--mesh", mesh)[0]
        except SystemExit as ended:  # argparse's own way, as everywhere
            code = ended.code
        assert code == 2, mesh
    assert run("plan", "ckpt")[0] == 2


LOADING = (("--dtype", "float16"), ("--device", "cpu"), ("--no-strict",), ("--ignore-mismatched",),
           ("--rename", "a", "b"), ("--seed", "1"), ("--no-defer",))  # fmt: skip


@pytest.mark.parametrize("option", LOADING, ids=lambda words: words[0])
def test_an_option_of_a_load_without_a_model_to_load_into_is_2(here, run, option):
    code, out, err = run("plan", "ckpt", "--mesh", "fsdp=2", *option)
    assert (code, out) == (2, "")
    assert err == f"weightlift plan: {option[0]} is for a load into a model: give --model module:callable too\n"
    assert run("plan", "ckpt", "--mesh", "fsdp=2", *TIED, *option)[0] in (0, 1)


# -- load -------------------------------------------------------------------------------------------------------------


def test_load_reports_and_times(here, run):
    code, out, err = run("load", "ckpt", *TIED, "--workers", "2", "--copy")
    assert (code, err) == (0, "")
    assert "7 loaded (1.4 kB" in out
    assert re.search(r"load +\d+\.\d{3} +1\.4 kB, .*B/s", out)
    assert "mapped" not in out
    assert "can be mapped" in run("load", "ckpt", *TIED)[1]


def test_load_that_does_not_fit(here, run):
    code, _, err = run("load", "ckpt", "--model", "cli_models:wide")
    assert code == 1
    assert err.startswith("weightlift load: ")
    assert re.search(r"\(\d+ problems\)", err)
    assert "Traceback" not in err


def test_load_tells_of_what_was_untied(here, run):
    save_file({"embed.weight": torch.ones(16, 8), "head.weight": torch.zeros(16, 8)}, here / "two.safetensors")
    code, out, err = run("load", "two.safetensors", *TIED, "--no-strict")
    assert code == 0
    assert "embed.weight and head.weight are tied" in err
    assert "missing in the checkpoint" in out
    assert "missing in the checkpoint" not in err


def test_load_json(here, run):
    save_file({"embed.weight": torch.ones(16, 8), "head.weight": torch.zeros(16, 8), "x": torch.ones(2),
               "layers.0.weight": torch.ones(9)}, here / "two.safetensors")  # fmt: skip
    options = ("--no-strict", "--ignore-mismatched", "--dtype", "bfloat16")
    code, out, err = run("load", "two.safetensors", *TIED, *options, "--json")
    found = json.loads(out)
    assert code == 0 and "they are untied" in err
    made = weightlift.plan(
        sys.modules["cli_models"].Tied, here / "two.safetensors",
        strict=False, ignore_mismatched=True, dtype=torch.bfloat16,
    )  # fmt: skip
    made.execute()
    assert found["module"] == "Tied" and found["source"] == str(here / "two.safetensors")
    assert found["loaded"] == ["embed.weight", "head.weight"] and found["unexpected_keys"] == ["x"]
    assert found["mismatched_keys"] == [{"fqn": "layers.0.weight", "found": [9], "expected": [8, 8]}]
    assert (found["loaded_bytes"], found["read_bytes"]) == (512, 1024)
    assert made.report.as_json().items() <= found.items()
    assert set(made.report.as_json()) == {field.name for field in dataclasses.fields(made.report)}
    assert found["mappable_bytes"] == 0 and set(found["seconds"]) == {"plan", "load"}
    assert json.loads(run("load", "ckpt", *TIED, "--json")[1])["mappable_bytes"] == 1376


def test_load_verify(here, run):
    """Content is compared with the hashes that are written down; without them there is nothing to compare with."""
    words = ("load", "ckpt", *TIED, "--verify")
    code, _, err = run(*words)
    assert code == 1 and "SHA256SUMS" in err
    files = sorted((here / "ckpt").iterdir())
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (here / "ckpt" / "SHA256SUMS").write_text("".join(lines))
    code, out, err = run(*words)
    assert (code, err) == (0, "") and "7 loaded" in out
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    assert run(*words[:-1])[0] == 0
    code, out, err = run(*words, "--json")
    assert code == 1 and files[0].name in err
    assert json.loads(out)["error"]["kind"] == "CheckpointCorrupt"


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify(here, run):
    code, out, err = run("verify", "ckpt")
    assert (code, err) == (0, "")
    assert out == "valid: 7 tensors, 1.4 kB in 2 files\n"
    assert json.loads(run("verify", "ckpt", "--json")[1]) == {"path": "ckpt", "valid": True, "problems": []}


def test_verify_gives_every_reason(here, run):
    file = here / "ckpt" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    index = here / "ckpt" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["gone"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(found))
    code, out, err = run("verify", "ckpt")
    assert code == 1
    assert "lies beyond the end of the file" in out
    assert "gone: the file lacks a key that the index promises" in out
    assert err == "weightlift verify: ckpt: 2 problems\n"
    report = json.loads(run("verify", "ckpt", "--json")[1])
    assert report["valid"] is False
    assert {problem["key"] for problem in report["problems"]} >= {"gone"}


@pytest.mark.parametrize("name", ["nothing", "."])
def test_verify_of_nothing(here, run, name):
    code, out, _ = run("verify", name)
    assert code == 1
    assert re.search(r"no such file or folder|no checkpoint in this folder", out)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "plan", "load"])
def test_a_checkpoint_that_is_not_there(here, run, command):
    model = () if command == "inspect" else TIED
    code, _, err = run(command, "nothing", *model)
    assert code == 1
    assert re.match(rf"weightlift {command}: no checkpoint: nothing: no such file", err)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(here, run):
    for words in (("--debug", "inspect", "nothing"), ("inspect", "nothing", "--debug")):
        code, _, err = run(*words)
        assert code == 1
        assert "Traceback" in err
        assert "CheckpointNotFound" in err


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("cli_models", r"expected module:callable"),
        ("cli_models:", r"expected module:callable"),
        (":Tied", r"expected module:callable"),
        ("cli_mdels:Tied", r"there is no module cli_mdels in the current directory or installed"),
        ("cli_models.inner:Tied", r"cli_models"),
        ("cli_broken:Tied", r"importing cli_broken failed: No module named 'there_is_no_such_package'"),
        ("cli_models:Tide", r"cli_models has no Tide; it has .*Tied"),
        ("cli_models:Namespace.biuld", r"Namespace has no biuld; it has build"),
        ("cli_models:number", r"number is not callable, it is an int"),
        ("cli_models:instance", r"is a module; give a callable that builds one"),
        ("cli_models:needs", r"needs arguments \(config, size\)"),
        ("cli_models:fails", r"building it failed: RuntimeError: no such config$"),
        ("cli_models:leaves", r"building it failed: SystemExit: 3"),
        ("cli_models:returns_text", r"must return a torch.nn.Module, found a str"),
        ("./cli_models.py:Tied", "is not the name of a module"),
        ("cli_models.py:Tied", "is not the name of a module"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "load"])
def test_wrong_model(here, run, model, why, command):
    code, out, err = run(command, "ckpt", "--model", model)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"weightlift {command}: --model {model!r}: ")
    assert re.search(why, err.strip())


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (("--dtype", "float33"), "'float33' is not a dtype of torch"),
        (("--dtype", "int8"), "not a floating-point dtype"),
        (("--device", "abacus"), "--device 'abacus'"),
        (("--device", "meta"), "without values"),
        (("--rename", "(", "x"), "--rename"),
        (("--rename", "a", r"\9"), "--rename"),
        (("--rename", "^", "a.", "--rename", "^", "b."), "--rename '^' is given twice"),
        (("--mesh", "fsdp=99999999999999999999"), "at most 1,048,576 can be worked out"),
    ],
)
def test_wrong_options(here, run, option, why):
    code, _, err = run("plan", "ckpt", *TIED, *option)
    assert code == 2
    assert why in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "load"])
def test_what_a_models_own_code_raises_is_a_line(here, run, command):
    code, out, err = run(command, "ckpt", "--model", "cli_models:Complains")
    assert (code, out) == (1, "")
    assert err == f"weightlift {command}: ValueError: the hook says no (--debug shows where)\n"
    assert "Traceback" in run(command, "ckpt", "--model", "cli_models:Complains", "--debug")[2]


def test_a_callable_within_a_class(here, run):
    assert run("plan", "ckpt", "--model", "cli_models:Namespace.build")[0] == 0


# -- processes --------------------------------------------------------------------------------------------------------


def test_as_a_module(here):
    done = subprocess.run(
        [sys.executable, "-m", "weightlift", "verify", "ckpt"],
        cwd=here, text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and "valid" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
def test_messages_do_not_come_into_the_output_where_standard_error_is_closed(here):
    line = f"exec {sys.executable} -m weightlift.cli.main plan ckpt --model cli_models:wide --json 2>&-"
    done = subprocess.run(["sh", "-c", line], cwd=here, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 1 and json.loads(done.stdout)["problems"]


def test_the_current_directory_is_searched(here):
    done = child("plan", "ckpt", *TIED, cwd=here)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_is_silent(here):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "weightlift.cli.main", "inspect", "ckpt"]
    done = subprocess.run(command, cwd=here, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_ascii_pipe(here):
    done = child("plan", "ckpt", *TIED, cwd=here, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    assert "layers.{0\\u20262}" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT")
def test_ctrl_c_is_130(here):
    (here / "slow.py").write_text("import time\ndef build():\n    print('building', flush=True)\n    time.sleep(60)\n")
    command = [sys.executable, "-m", "weightlift.cli.main", "load", "ckpt", "--model", "slow:build"]
    process = subprocess.Popen(
        command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background has it ignored
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_bench_runs_a_case_and_writes_its_results(here, tmp_path):
    out = tmp_path / "out"
    done = child("bench", "ordinary", "--rounds", "1", "--scale", "0.001", "--out", str(out), cwd=here)
    assert done.returncode == 0, done.stderr
    assert "**weightlift**" in done.stdout
    (result,) = json.loads((out / "results.json").read_text())["results"]
    assert result["failed"] == {} and set(result["seconds"]) == {"weightlift", "construct + load_state_dict"}
    assert "ordinary" in (out / "results.md").read_text() and "<svg" in (out / "results.svg").read_text()


def test_bench_knows_its_cases_and_says_so(here):
    done = child("bench", "--list", cwd=here)
    assert done.returncode == 0 and "same-dtype" in done.stdout
    assert child("bench", "no-such-case", cwd=here).returncode == 2


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--rounds", "0"), "--rounds"),
        (("--scale", "-1"), "--scale"),
        (("--scale", "nan"), "--scale"),
        (("--beside", "nobody"), "no such peer in these cases: nobody"),
    ],
)
def test_a_benchmark_that_can_not_be(here, words, why):
    done = child("bench", "ordinary", *words, cwd=here)
    assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr


def test_results_that_can_not_be_written_are_told_before_anything_is_measured(here):
    (here / "file").touch()
    done = child("bench", "ordinary", "--scale", "0.001", "--out", "file", "--folder", "no-such-folder", cwd=here)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File exists" in done.stderr


def test_each_peer_of_a_benchmark_can_be_named():
    for case in map(benchmark_cases.find, benchmark_cases.FILES):
        assert not [name for name in case.contenders if "," in name], "--beside parts names at commas"


def test_the_list_of_benchmarks_in_ascii(here):
    done = child("bench", "--list", cwd=here, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and "\\u2265" in done.stdout, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT")
def test_ctrl_c_leaves_nothing_of_a_benchmark(here):
    """The suite is told by the terminal too, and has time to remove what it made."""
    folder = here / "made"
    folder.mkdir()
    words = ["bench", "same-dtype", "--rounds", "9", "--scale", "0.05", "--folder", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "weightlift.cli.main", *words],
        cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for _ in range(600):
        if any(folder.rglob("*.safetensors")):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.count("interrupted") == 1 and not any(folder.iterdir())
