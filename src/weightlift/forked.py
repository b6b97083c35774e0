"""What a forked child has to put right before its threads run tensor code.

In a process whose number of threads was set (`torch.set_num_threads`), every new thread asks torch for its pool when it
first runs something parallel. The first to ask in a forked child replaces the parent's pool, and whoever asks meanwhile
finds none: ``Invalid thread pool!`` (torch 2.13: 99 of 100 children with four threads, 64 set). torch's own repair, a
call of ``get_num_threads`` in every child, does nothing where the forking thread itself has asked before.
"""

from __future__ import annotations

import os
import threading

import torch

from weightlift.locks import Lock

_settled = False
_lock = Lock(reentrant=True)  # a signal's handler may come in between


def settle() -> None:
    """Have torch's pool replaced by one short thread, once in a process, before several could ask for it."""
    global _settled
    if _settled:
        return
    with _lock.own:
        if not _settled:
            thread = threading.Thread(target=torch.get_num_threads, name="weightlift-settle", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return  # the system gives no thread: there are none that could ask at the same time
            thread.join()
            _settled = True


def _forked() -> None:
    """In the child nothing is settled."""
    global _settled
    _settled = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
