"""Work in forked children that may hang."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable

PATIENCE_SECONDS = 60


def in_child(work: Callable[[], object]) -> int | None:
    """The exit status of a forked child that does this; None where it did not end."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
