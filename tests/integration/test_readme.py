"""The documentation does what it says: every Python snippet and every example runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# server.py runs until it is stopped; tests/concurrency/test_server.py holds it under load.
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "server.py")
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def run(script: Path, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(script)]
    if "torch.distributed" in script.read_text(encoding="utf-8"):
        command = ["-m", "tests.distributed.ending", *command]
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_snippets(document: Path, tmp_path: Path) -> None:
    """The snippets of one document, in order and in one process."""
    text = document.read_text(encoding="utf-8")
    # Blank lines before each keep the line numbers of tracebacks those of the document.
    script, line = "", 0
    for found in SNIPPET.finditer(text):
        start = text.count("\n", 0, found.start(1))
        script += "\n" * (start - line) + found[1]
        line = start + found[1].count("\n")
    if not script:
        pytest.skip("no snippet")
    path = tmp_path / f"snippets_of_{document.stem}.py"  # not transformers.py, which would be imported
    path.write_text(script, encoding="utf-8")
    run(path, tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_end_once(document: Path) -> None:
    """A fence too many shows the rest of a document inside out, and its snippets are not run."""
    inside = False
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            assert not inside or line == "```", line
            inside = not inside
    assert not inside


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples(example: Path, tmp_path: Path) -> None:
    printed = run(example, tmp_path)
    assert printed
    assert list(tmp_path.iterdir()) == []
    if example.name == "threads.py":  # what the README shows of it, but for how the first program fails
        end = printed[printed.index("under weightlift run:") :]
        assert f"\n{end}```\n" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_plan_in_the_documentation_is_the_plan(tmp_path: Path) -> None:
    """The first output block of docs/plan.md is what its first snippet prints."""
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    snippet = SNIPPET.search(text)
    shown = re.search(r"^```text\n(.*?)^```$", text, re.S | re.M)
    assert snippet is not None
    assert shown is not None
    (tmp_path / "plan_snippet.py").write_text(snippet[1], encoding="utf-8")
    assert run(tmp_path / "plan_snippet.py", tmp_path) == shown[1]


def test_what_the_readme_says_is_needed() -> None:
    """The versions are those of the package, and snippets that import more than it needs say what to install."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python, torch = re.search(r'requires-python = ">=(.*?)"', project), re.search(r'"torch>=(.*?)"', project)
    assert python is not None and torch is not None
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {python[1]} and torch {torch[1]}, or later" in text.replace("\n", " ")
    known = {"__future__", "torch", "weightlift"}
    for section in text.split("\n## "):
        code = "\n".join(SNIPPET.findall(section))
        for name in set(re.findall(r"^(?:from|import) (\w+)", code, re.M)) - known:
            assert re.search(rf"pip install [^\n`]*{name.replace('_', '-')}", section), name
