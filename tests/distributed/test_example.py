"""examples/fsdp2.py under torchrun, as its first lines say, but for how a process ends (`tests.distributed.ending`)."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.distributed.launch import ROOT


def test_the_example_runs_under_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [*command, "-m", "tests.distributed.ending", "examples/fsdp2.py"], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} read and holds" in done.stdout
