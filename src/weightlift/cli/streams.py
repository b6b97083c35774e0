"""Output that can't be written (whoever reads it has gone, the disk is full, there never was any), and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable


def guarded(call: Callable[[], int], program: str, *, debug: bool = False) -> int:
    """Call, and see the output off. A reader that has gone ends it quietly (141, as SIGPIPE would), what else the
    system refuses with a line on standard error (1), Ctrl-C with another (130).
    """
    try:
        try:
            return call()
        finally:
            if sys.stdout is not None:  # it was closed before we began
                sys.stdout.flush()
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:
        _drop_output()
        return 128 + 13
    except OSError as error:
        _drop_output()
        with contextlib.suppress(OSError):
            complain("".join(traceback.format_exception(error)).rstrip() if debug else f"{program}: {error}")
        return 1


def complain(text: str) -> None:
    """A line on standard error. Where that was closed there is none: ``print`` would take standard output for it."""
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def any_character() -> None:
    """Have the streams take what a key may hold, whatever their encoding is."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """What is still buffered must not fail a second time at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file of the system's: nothing to be done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
