"""``weightlift run`` and ``python`` side by side: the same program sees and prints the same, and ends the same way."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# As pip writes the command.
COMMAND = "import sys\nfrom weightlift.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"

PROBE = '''
"""A program that looks at where it is."""
import atexit, json, pickle, sys, threading, time

class Mine:
    pass

def typed(x: int): ...

def told(text):
    found = {name: globals().get(name, "nowhere") for name in
             ("__name__", "__file__", "__package__", "__cached__", "__doc__", "__builtins__", "__annotations__")}
    loader = __loader__ if isinstance(__loader__, type) else type(__loader__)
    print(text, json.dumps({
        **{name: str(value) for name, value in found.items()},
        "spec": None if __spec__ is None else [__spec__.name, __spec__.origin],
        "loader": [loader.__name__, isinstance(__loader__, type), getattr(__loader__, "path", None)],
        "names": sorted(globals()), "argv": sys.argv, "path": sys.path,
        "__main__": sys.modules["__main__"].__dict__ is globals() and __import__("__main__").Mine is Mine,
        "annotated": str(typed.__annotations__), "pickled": type(pickle.loads(pickle.dumps(Mine()))).__name__,
    }), flush=True)

def later():
    time.sleep(0.2)
    told("in a thread, after the last line")

told("now")
atexit.register(told, "at exit")
threading.Thread(target=later).start()
'''

SPAWNED = """
import multiprocessing, sys, __main__

class Mine:
    def __init__(self, number): self.number = number

def more(mine): return Mine(mine.number + 1)

if __name__ == "__main__":
    for method in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, [item.number for item in pool.map(more, [Mine(1), Mine(2)])])
"""

ENDS = {
    "an exception": "def f():\n    1 / 0\ntry:\n    f()\nexcept Exception as e:\n    raise ValueError('mine') from e",
    "a syntax error": "print('not reached')\n1 +",
    "another encoding": "# coding: latin-1\nprint(ascii('caf\xe9'))".encode("latin-1"),
    "an exit with a text": "import atexit\natexit.register(lambda: print(__file__))\nraise SystemExit('enough')",
    "an exit code": "import sys; sys.exit(7)",
    "an interrupt": "raise KeyboardInterrupt",
    "a hook of its own": """
import sys, traceback
def hook(kind, error, trace):
    print("hook", kind, error, traceback.extract_tb(trace), sys.last_traceback is trace, __file__)
sys.excepthook = hook
raise ValueError('mine')""",
    "a warning": "import warnings\nwarnings.warn('old', DeprecationWarning)",
    "no __main__": "import sys\ndel sys.modules['__main__']",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {
        "command/weightlift": COMMAND,
        "here/probe.py": PROBE,
        "here/-odd.py": PROBE,
        "here/package/__init__.py": "",
        "here/package/__main__.py": PROBE,
        "here/package/part.py": PROBE,
        "here/spawned.py": SPAWNED,
        "here/beside.py": "",
        "here/imports.py": "import beside\nprint(beside.__file__)",
        "links/unrelated.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "links" / "linked.py").symlink_to("../here/imports.py")
    (tmp_path / "links" / "package").symlink_to(tmp_path / "here" / "package")
    with zipfile.ZipFile(tmp_path / "here" / "zipped.pyz", "w") as file:
        file.writestr("__main__.py", PROBE)
    compileall.compile_file(tmp_path / "here" / "probe.py", legacy=True, quiet=1)
    return tmp_path


def both(folder: Path, *words: str, python: tuple[str, ...] = (), stdin: bytes = b"", **environment: str) -> str:
    """Run a program both ways, hold everything that is seen of it equal, and give its output."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    seen = [
        subprocess.run(
            [sys.executable, *python, *command, *words],
            cwd=folder / "here", env=kept, input=stdin, capture_output=True, timeout=100, check=False,
        )
        for command in ((), (str(folder / "command" / "weightlift"), "run"))
    ]  # fmt: skip
    alone, run = [(done.returncode, done.stdout.decode(), done.stderr.decode()) for done in seen]
    assert run == alone
    return alone[1]


@pytest.mark.parametrize(
    "words",
    [
        ("probe.py",),
        ("./probe.py", "--", "-m", "x", "--help", "--debug", "--"),
        ("../here/probe.py", "--"),
        ("probe.pyc", ""),
        ("package", "--version"),
        ("../links/package/",),
        ("zipped.pyz", "-"),
        ("-m", "probe", "-m", "--", "x"),
        ("-m", "package", "--help"),
        ("-mpackage.part", "run"),
        ("--", "probe.py", "--"),
        ("--", "-odd.py"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("safe", [False, True], ids=["", "PYTHONSAFEPATH"])
def test_where_a_program_is(folder: Path, words: tuple[str, ...], safe: bool) -> None:
    found = both(folder, *words, **({"PYTHONSAFEPATH": "1"} if safe else {}))
    fails = safe and words[0].startswith("-m") and sys.version_info >= (3, 11)
    assert found.count("__main__") == 0 if fails else found.count("at exit") == 1 and found.count("after the last") == 1


def test_the_standard_input(folder: Path) -> None:
    assert "at exit" in both(folder, "-", "x", "-", stdin=PROBE.encode())
    assert both(folder, "-", stdin=b"import sys; print(sys.stdin.read(), sys.argv)") == " ['-']\n"


def test_what_lies_beside_a_linked_script(folder: Path) -> None:
    beside = f"{folder / 'here' / 'beside.py'}\n"
    assert both(folder, "../links/linked.py") == beside
    assert both(folder, "imports.py") == beside
    assert both(folder, "imports.py", PYTHONSAFEPATH="1") == ("" if sys.version_info >= (3, 11) else beside)


def test_options_of_the_interpreter(folder: Path) -> None:
    assert both(folder, "-c" if False else "probe.py", python=("-O", "-W", "error"))
    (folder / "here" / "flags.py").write_text("import sys; print(sys.flags, sys.warnoptions)")
    assert both(folder, "flags.py", python=("-O", "-W", "error", "-B"))


def test_worker_processes(folder: Path) -> None:
    assert both(folder, "spawned.py").count("[2, 3]") >= 1
    assert both(folder, "-m", "spawned").count("[2, 3]") >= 1


@pytest.mark.parametrize("ending", ENDS)
def test_how_a_program_ends(folder: Path, ending: str) -> None:
    source = ENDS[ending]
    (folder / "here" / "ends.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    both(folder, "ends.py")
    both(folder, "-m", "ends")
    if isinstance(source, str):  # python can't read another encoding twice
        both(folder, "-", stdin=source.encode())


def test_nothing_is_imported_before_the_program_begins(folder: Path) -> None:
    (folder / "here" / "early.py").write_text(
        "import sys\nprint([name for name in ('torch', 'numpy', 'transformers', 'huggingface_hub', 'tokenizers')"
        " if name in sys.modules])"
    )
    assert both(folder, "early.py") == "[]\n"


SETS = """
import os
os.environ.update(HF_HOME=os.path.abspath("home"), OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="critical")
import huggingface_hub, torch, transformers
from transformers import BertModel
print(huggingface_hub.constants.HF_HUB_CACHE, torch.get_num_threads(), transformers.utils.logging.get_verbosity())
print(BertModel.from_pretrained.__func__.__module__ != "transformers.modeling_utils")
"""


def test_environment_variables_that_a_program_sets(folder: Path) -> None:
    (folder / "here" / "sets.py").write_text(SETS)
    found = [
        subprocess.run(
            [sys.executable, *command, "sets.py"], cwd=folder / "here", capture_output=True, text=True, check=True
        ).stdout.split()
        for command in ([], [str(folder / "command" / "weightlift"), "run"])
    ]
    assert found[0] == [str(folder / "here" / "home" / "hub"), "1", "50", "False"]
    assert found[1] == [*found[0][:3], "True"]


@pytest.mark.parametrize("words", [(), ("--debug",), ("-m",), ("none.py",), ("-x", "probe.py")], ids=" ".join)
def test_nothing_to_run(folder: Path, words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, str(folder / "command" / "weightlift"), "run", *words],
        cwd=folder / "here", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "weightlift" in done.stderr and "Traceback" not in done.stderr
