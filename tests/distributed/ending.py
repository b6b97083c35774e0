"""How a process of these tests ends once torch.distributed was used in it.

As a command it runs a script in this way: ``python -m tests.distributed.ending examples/fsdp2.py``.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """Destroy the process group and `end`."""
    dist.destroy_process_group()
    end()


def end() -> NoReturn:
    """End this process well, and without Python's finalisation.

    A thread of gloo drops an operation some time after everybody saw it finish, and with it the Python objects that
    belonged to the caller's thread: the context that every backward leaves there (``torch.autograd.graph``), or the
    last reference to a tensor. It asks for the GIL then, and where Python is finalising it is ended for that in the
    midst of a C++ destructor: "terminate called without an active exception" (pytorch/pytorch#190489). Whoever holds
    the process group, as meshes and FSDP's modules do, keeps that thread alive over ``destroy_process_group``. It has
    nothing to do with what is tested here.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    runpy.run_path(sys.argv[1], run_name="__main__")
    end()
