"""Training by accelerate and by Transformers' Trainer under torchrun, of models of which one rank has the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.distributed.launch import ROOT

KINDS = ("fsdp2", "fsdp1", "ddp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, kinds in (([], ["plain"]), (torchrun, KINDS)):
        command = [sys.executable, *launcher, "tests/distributed/trainer.py", str(folder), *kinds]
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("by", ["trainer", "accelerate"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_one_process(folder, kind, by):
    plain = json.loads((folder / "plain-0.json").read_text())[by]
    assert len(plain) == 20
    for rank in range(2):
        # Means of halves in another order than means of wholes: float32 differs in its last digits.
        assert json.loads((folder / f"{kind}-{rank}.json").read_text())[by] == pytest.approx(plain, rel=1e-5)
