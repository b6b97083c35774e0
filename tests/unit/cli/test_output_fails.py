"""Commands whose output, or whose trace, can't be written: a message and an exit code, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

TIED = ("--model", "cli_models:Tied")
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")


def test_a_trace_in_no_folder(here, run):
    code, out, err = run("load", "ckpt", *TIED, "--trace", "none/trace.html")
    assert (code, out) == (2, "")
    assert err == "weightlift load: --trace: there is no folder none for trace.html; make it first\n"


@FULL
def test_a_trace_on_a_full_disk(here, run):
    code, out, err = run("load", "ckpt", *TIED, "--trace", "/dev/full", "--quiet")
    assert code == 0 and "loaded" in out
    assert "ckpt into Tied could not be written to /dev/full" in err and "Traceback" not in err
