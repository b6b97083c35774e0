"""Settling torch's pool must not stand in the way of a load."""

import subprocess
import sys
import textwrap


def run(code):
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def test_where_the_system_gives_no_thread_a_module_is_built_and_loaded_without():
    found = run("""
        import threading
        import torch
        import weightlift as wl

        threading.stack_size(1 << 46)  # more than there is
        state = {"weight": torch.ones(3, 3), "bias": torch.ones(3)}
        wl.defer(lambda: torch.nn.Linear(3, 3)).materialize()
        print(wl.load(lambda: torch.nn.Linear(3, 3), state, workers=1).weight.sum().item())
    """)
    assert found == ["9.0"]


def test_a_load_in_a_signals_handler_does_not_wait_for_the_one_that_it_came_into():
    found = run("""
        import faulthandler
        import torch
        import weightlift as wl
        from weightlift import forked

        faulthandler.dump_traceback_later(60, exit=True)
        with forked._lock.own:  # as while the thread is waited for
            wl.defer(lambda: torch.nn.Linear(3, 3)).materialize()
        print("loaded")
    """)
    assert found == ["loaded"]
