"""Running somebody's program in this process as ``python`` itself runs it.

The program gets a ``__main__`` of its own, which stays for what runs after its last line: threads, functions called at
exit, pickles of its classes. ``sys.argv`` and the first entry of the search path are what ``python`` would give it.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType, TracebackType
from typing import Any

_run_as_main: Any = runpy.__dict__["_run_module_as_main"]  # what python itself calls
_STDIN = "<stdin>"
_SCRIPTS = ("__file__", "__cached__")  # what python adds to the __main__ of a script, and takes away again


class CannotOpen(Exception):
    """The program's file can't be read."""


def run(program: str | None, module: str | None, arguments: Sequence[str]) -> None:
    """Run the script, folder, zip or ``-`` (stdin) ``program``, or ``module`` by its name. Raises what it raises, with
    the traceback shown from the program's first line on; CannotOpen where there is nothing to run.
    """
    try:
        if module is not None:
            _run_module(module, arguments)
        elif program is not None and program != "-" and pkgutil.get_importer(program) is not None:
            _run_folder(program, arguments)
        elif program is not None:
            _run_script(program, arguments)
    except (SystemExit, CannotOpen):
        raise
    except BaseException:
        _show_its_own()
        raise
    _over()


def _run_module(name: str, arguments: Sequence[str]) -> None:
    _search(os.getcwd())
    _begin("-m", arguments)
    _run_as_main(name)


def _run_folder(path: str, arguments: Sequence[str]) -> None:
    """A folder or zip with a ``__main__.py``."""
    _search(_absolute(path), always=True)
    _begin(path, arguments)
    _run_as_main("__main__", False)


def _run_script(path: str, arguments: Sequence[str]) -> None:
    code, file, loader = _code(path)
    _search(_folder(path))
    main = _begin(path, arguments)
    main.__dict__.update(dict.fromkeys(_SCRIPTS), __file__=file, __loader__=loader)
    exec(code, main.__dict__)


def _over() -> None:
    """What ``python`` does after a script's last line, before threads and functions at exit."""
    main = sys.modules.get("__main__")
    if main is not None and main.__spec__ is None:
        for name in _SCRIPTS:
            main.__dict__.pop(name, None)


def _begin(name: str, arguments: Sequence[str]) -> ModuleType:
    """The ``__main__`` that a program begins with."""
    sys.argv[:] = [name, *arguments]
    main = ModuleType("__main__")
    names: dict[str, Any] = {"__builtins__": builtins, "__loader__": importlib.machinery.BuiltinImporter}
    if sys.version_info < (3, 14):
        names["__annotations__"] = {}
    main.__dict__.update(names)
    sys.modules["__main__"] = main
    return main


def _search(first: str, *, always: bool = False) -> None:
    """Put the first entry of the search path in the place of the one that this command was found by.

    Neither is there with ``-P`` or ``-I``, with which ``python`` adds a folder or zip that it runs (``always``) alone.
    """
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = first
    elif always:
        sys.path.insert(0, first)


def _folder(script: str) -> str:
    """Where a script's own imports are looked for: beside the file itself, not beside a link to it."""
    if script == "-":
        return ""
    return os.path.dirname(os.path.abspath(script) if os.name == "nt" else os.path.realpath(script))


def _code(script: str) -> tuple[CodeType, str, Any]:
    """A script compiled, its ``__file__`` and the loader that it would have. Raises SyntaxError, and CannotOpen."""
    if script == "-":
        return _compiled(sys.stdin.buffer.read(), _STDIN), _STDIN, importlib.machinery.BuiltinImporter
    path = _absolute(script)
    try:
        with io.open_code(path) as file:
            code: CodeType | None = pkgutil.read_code(file)  # of a compiled file
            file.seek(0)
            source = b"" if code is not None else file.read()
    except OSError as error:
        raise CannotOpen(error.strerror or str(error)) from error
    if code is not None:
        return code, path, importlib.machinery.SourcelessFileLoader("__main__", path)
    return _compiled(source, path), path, importlib.machinery.SourceFileLoader("__main__", path)


def _compiled(source: bytes, name: str) -> CodeType:
    made: CodeType = compile(source, name, "exec", dont_inherit=True)  # not with the future imports of this file
    return made


def _absolute(script: str) -> str:
    """The path as ``python`` makes it absolute: links and ``..`` stay as they are."""
    if os.name == "nt":
        return os.path.abspath(script)
    return os.path.join(os.getcwd(), script)


def _show_its_own() -> None:
    """Have the exception that is about to end the process shown without the frames outside of the program."""
    theirs = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = theirs
        own = trace
        while own is not None and own.tb_frame.f_globals is not globals():
            own = own.tb_next
        if own is not None:
            while own is not None and own.tb_frame.f_globals is globals():
                own = own.tb_next
            error.__traceback__ = trace = sys.last_traceback = own
        theirs(kind, error, trace)
        _over()

    sys.excepthook = show
