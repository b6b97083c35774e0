"""The drop-in and the moment at which a library is imported: before, afterwards, and in the midst of it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from weightlift.integrations import drop_in

LIBRARY = "class Model:\n    def load(self): return 'theirs'\n"
SLOW = """
import threading
entered, go_on = threading.Event(), threading.Event()

class Model:
    def load(self): return 'theirs'

entered.set()
assert go_on.wait(60)
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of somebody's, of which the drop-in replaces one method."""
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "__init__.py").write_text("")
    file = tmp_path / "somebodys" / "models.py"
    file.write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))

    def replacement(module: ModuleType) -> tuple[object, str, object]:
        return module.Model, "load", lambda self: "ours"

    monkeypatch.setattr(drop_in, "_REPLACED", {"somebodys.models": replacement})
    yield file
    drop_in.uninstall()
    for name in ("somebodys.models", "somebodys"):
        sys.modules.pop(name, None)


def loaded() -> str:
    return str(importlib.import_module("somebodys.models").Model().load())


def test_before_and_after_the_import(library: Path) -> None:
    finders = list(sys.meta_path)
    drop_in.install()
    assert "somebodys.models" not in sys.modules
    assert loaded() == "ours"
    assert type(sys.modules["somebodys.models"].__loader__).__name__ == "SourceFileLoader"
    drop_in.uninstall()
    assert loaded() == "theirs" and sys.meta_path == finders
    drop_in.install()
    assert loaded() == "ours"


def test_it_is_imported_again(library: Path) -> None:
    drop_in.install()
    assert loaded() == "ours"
    importlib.reload(sys.modules["somebodys.models"])
    assert loaded() == "ours"
    drop_in.uninstall()
    assert loaded() == "theirs"


def test_the_drop_in_is_taken_out_before_the_import(library: Path) -> None:
    drop_in.install()
    drop_in.uninstall()
    assert loaded() == "theirs"


def install_within_an_import(load: Callable[[], object], meanwhile: Callable[[], None] = lambda: None) -> None:
    """`install` while another thread is within its import of the module, which waits to be told to go on."""
    importing = threading.Thread(target=load)
    importing.start()
    while not hasattr(sys.modules.get("somebodys.models"), "entered"):
        importing.join(0.01)
    module = sys.modules["somebodys.models"]
    meanwhile()
    installing = threading.Thread(target=drop_in.install)
    installing.start()
    installing.join(0.2)
    module.go_on.set()
    installing.join(60)
    importing.join(60)


def test_while_another_thread_imports(library: Path) -> None:
    library.write_text(SLOW)
    install_within_an_import(loaded)
    assert loaded() == "ours"


def test_an_import_that_fails_meanwhile(library: Path) -> None:
    library.write_text(SLOW + "raise RuntimeError('theirs')\n")
    seen: list[BaseException] = []

    def failing() -> None:
        try:
            loaded()
        except RuntimeError as error:
            seen.append(error)

    def afterwards() -> None:
        library.write_text(LIBRARY)
        importlib.invalidate_caches()

    install_within_an_import(failing, afterwards)
    assert len(seen) == 1 and loaded() == "ours"


def test_in_the_midst_of_the_import_itself(library: Path) -> None:
    library.write_text("from weightlift.integrations import drop_in\ndrop_in.install()\n" + LIBRARY)
    with pytest.raises(RuntimeError, match=r"somebodys\.models is being imported by this very thread"):
        loaded()
    assert not drop_in._finders


def test_the_libraries_themselves_are_not_imported() -> None:
    program = "import sys, weightlift; weightlift.install(); print([name for name in ('torch', 'transformers', 'numpy')"
    done = subprocess.run(
        [sys.executable, "-c", f"{program} if name in sys.modules])"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


PROGRAM = """
import weightlift
weightlift.install()
from transformers import PreTrainedModel
from transformers.utils import output_capturing
found = [PreTrainedModel.__dict__["from_pretrained"], output_capturing._active_collector]
weightlift.uninstall()
print(found[0].__func__.__module__.split(".")[0], found[1].__module__.split(".")[0])
print(PreTrainedModel.from_pretrained.__func__.__module__, type(output_capturing._active_collector).__module__)
"""


def test_transformers_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    theirs = ["transformers.modeling_utils", "transformers.utils.output_capturing"]
    assert done.stdout.split() == ["weightlift", "weightlift", *theirs], done.stderr
