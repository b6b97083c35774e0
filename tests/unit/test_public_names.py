"""The public names: all there, sorted, seen by type checkers, and imported only when they are used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import weightlift


def test_all_is_sorted_and_there():
    assert list(weightlift.__all__) == sorted(weightlift.__all__)
    assert all(getattr(weightlift, name) is not None for name in weightlift.__all__)
    assert {name for name in dir(weightlift) if not name.startswith("__")} == set(weightlift.__all__)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        weightlift.nothing_like_this


def test_type_checkers_see_what_is_there():
    tree = ast.parse(Path(weightlift.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == weightlift._HOMES and set(seen) == set(weightlift.__all__)
    for name, home in seen.items():
        assert getattr(weightlift, name) is getattr(importlib.import_module(home), name)


def test_plans_know_the_class_that_they_make():
    """For type checkers: what `load` returns, a plan returns as well."""
    made = {"plan": "LoadPlan[_Module]", "defer": "Deferred[_Module]", "load": "_Module"}
    assert {name: getattr(weightlift, name).__annotations__["return"] for name in made} == made
    for method in (weightlift.LoadPlan.execute, weightlift.Deferred.load, weightlift.Deferred.materialize):
        assert method.__annotations__["return"] == "_Module"
    assert weightlift.LoadPlan[int] is not None and weightlift.Deferred[int] is not None


@pytest.mark.parametrize("code", [
    "import weightlift; weightlift.__version__, dir(weightlift)",
    "from weightlift.cli.main import main; main(['--version'])",
    "from weightlift.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "from weightlift.cli.main import main\ntry: main(['load', '--help'])\nexcept SystemExit: pass",
])  # fmt: skip
def test_torch_is_not_imported_for_nothing(code):
    checked = f"{code}\nimport sys\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", checked], check=True, timeout=60, stdout=subprocess.DEVNULL)
