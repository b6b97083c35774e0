"""Output that can't be written: whoever reads it has gone, the disk is full, there never was any."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable


def guarded(call: Callable[[], int], program: str, *, debug: bool = False) -> int:
    """Call, and see the output off. A reader that has gone ends it quietly (141, as SIGPIPE would), and what else the
    system refuses with a line on standard error (1).
    """
    try:
        try:
            return call()
        finally:
            if sys.stdout is not None:  # it was closed before we began
                sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 128 + 13
    except OSError as error:
        _drop_output()
        with contextlib.suppress(OSError):
            if debug:
                traceback.print_exception(error)
            else:
                print(f"{program}: {error}", file=sys.stderr)
        return 1


def _drop_output() -> None:
    """What is still buffered must not fail a second time at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file of the system's: nothing to be done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
